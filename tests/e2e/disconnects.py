"""Clients that leave: at every point of a request's life, in every way, many at a time."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from benchmarks.soak import bodies
from benchmarks.soak.wire import Connection, Leaving, request

NUM_CLIENTS = 64
NUM_PERMITS = 48
"""Fewer than clients: some requests are refused."""
MAX_TOKENS = 8
FULL = NUM_PERMITS - 8
"""Sequences of a request that hardly ever finds so many permits."""
REFUSED = "no permit"
PAUSE_S = 0.2
"""Before a client that was refused tries again: a crowd of them would take the engine's time."""
SOON_S = (0.0, 0.001, 0.005, 0.02)

Point = Callable[[Connection, random.Random], Awaitable[None]]


def stream(chance: random.Random, **parameters: Any) -> bytes:
    given = {"max_new_tokens": MAX_TOKENS, "ignore_eos": True, **parameters}
    return request("/generate_stream", {"inputs": bodies.prompt(chance, 4), "parameters": given})


def chat(chance: random.Random, **fields: Any) -> bytes:
    body = {"messages": bodies.user(bodies.prompt(chance, 4)), "max_tokens": MAX_TOKENS, "stream": True, **fields}
    return request("/v1/chat/completions", body)


class RefusedError(Exception):
    """There was no permit, so the client has not come to its point."""


async def read_events(connection: Connection, count: int) -> None:
    """Read until so many events have come, or the answer has ended. Raises RefusedError."""
    status, num_events = await connection.status(), 0
    if status == 429:
        raise RefusedError
    assert status == 200, status
    async for chunk in connection.chunks():
        num_events += chunk.count(b"data:")
        if num_events >= count:
            return


async def within_the_head(connection: Connection, chance: random.Random) -> None:
    data = stream(chance)
    await connection.send(data[: chance.randrange(data.index(b"\r\n\r\n") + 4)])


async def within_the_body(connection: Connection, chance: random.Random) -> None:
    data = stream(chance)
    await connection.send(data[: chance.randrange(data.index(b"\r\n\r\n") + 4, len(data))])
    await asyncio.sleep(chance.choice(SOON_S))


async def right_after_the_body(connection: Connection, chance: random.Random) -> None:
    await connection.send(stream(chance))


async def where_permits_may_lack(connection: Connection, chance: random.Random) -> None:
    await connection.send(chat(chance, n=FULL, max_tokens=2))
    await asyncio.sleep(chance.choice(SOON_S))


async def in_the_rendering_of_a_chat(connection: Connection, chance: random.Random) -> None:
    await connection.send(chat(chance))
    await asyncio.sleep(chance.choice(SOON_S))


async def in_the_check_of_a_grammar(connection: Connection, chance: random.Random) -> None:
    """A grammar that was not there before."""
    grammar = {"type": "json", "value": {**bodies.SCHEMA, "title": str(chance.random())}}
    await connection.send(stream(chance, grammar=grammar))
    await asyncio.sleep(chance.choice(SOON_S))


async def before_the_first_token(connection: Connection, chance: random.Random) -> None:
    inputs = bodies.prompt(chance, 120)
    await connection.send(request("/generate_stream", {"inputs": inputs, "parameters": bodies.SMALL}))
    await asyncio.sleep(chance.choice(SOON_S))


async def before_a_whole_answer(connection: Connection, chance: random.Random) -> None:
    body = {"inputs": bodies.prompt(chance, 4), "parameters": {"max_new_tokens": MAX_TOKENS, "ignore_eos": True}}
    await connection.send(request("/generate", body))
    await asyncio.sleep(chance.choice(SOON_S))


async def in_the_middle_of_a_stream(connection: Connection, chance: random.Random) -> None:
    await connection.send(stream(chance))
    await read_events(connection, chance.randint(1, MAX_TOKENS - 1))


async def in_the_middle_of_a_chat(connection: Connection, chance: random.Random) -> None:
    await connection.send(chat(chance, n=3))
    await read_events(connection, chance.randint(1, MAX_TOKENS))


async def at_the_last_token(connection: Connection, chance: random.Random) -> None:
    await connection.send(stream(chance))
    await read_events(connection, MAX_TOKENS)


async def with_more_requests_behind(connection: Connection, chance: random.Random) -> None:
    await connection.send(stream(chance) + chat(chance) + stream(chance))
    await read_events(connection, chance.randint(1, MAX_TOKENS))


async def after_the_answer(connection: Connection, chance: random.Random) -> None:
    await connection.send(stream(chance))
    await read_events(connection, MAX_TOKENS + 1)


POINTS: tuple[Point, ...] = (
    within_the_head,
    within_the_body,
    right_after_the_body,
    where_permits_may_lack,
    in_the_rendering_of_a_chat,
    in_the_check_of_a_grammar,
    before_the_first_token,
    before_a_whole_answer,
    in_the_middle_of_a_stream,
    in_the_middle_of_a_chat,
    at_the_last_token,
    with_more_requests_behind,
    after_the_answer,
)


async def disconnect(
    port: int, num_requests: int, seed: int, refused: asyncio.Event | None = None
) -> collections.Counter[str]:
    """Every point in every way, again and again; returns how often each came, and how often a permit lacked.

    `refused` is set as soon as a permit lacks.

    Raises ConnectionError for a connection that the server has closed.
    """
    cases = [(point, way) for point in POINTS for way in Leaving]
    counts: collections.Counter[str] = collections.Counter()
    waiting = iter(range(num_requests))

    async def has_left(index: int) -> bool:
        point, way = cases[index % len(cases)]
        connection = await Connection.open(port)
        with contextlib.closing(connection):
            try:
                await point(connection, random.Random(f"{seed} {index}"))
            except RefusedError:
                counts[REFUSED] += 1
                if refused is not None:
                    refused.set()
                await asyncio.sleep(PAUSE_S)
                return False
            await connection.leave(way)
        counts[f"{point.__name__}: {way.value}"] += 1
        return True

    async def client() -> None:
        for index in waiting:
            while not await has_left(index):
                pass

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return counts


@contextlib.asynccontextmanager
async def held_permits(port: int) -> AsyncIterator[list[int]]:
    """Holds all permits with streams of many tokens; yields their statuses, and that of one request more."""
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 1000, "ignore_eos": True}}
    async with contextlib.AsyncExitStack() as stack:
        statuses = []
        for _ in range(NUM_PERMITS + 1):
            connection = stack.enter_context(contextlib.closing(await Connection.open(port)))
            await connection.send(request("/generate_stream", body))
            statuses.append(await connection.status())
        yield statuses


async def has_all_permits(port: int) -> bool:
    """As many streams as there are permits can be open, and one more is refused."""
    async with held_permits(port) as statuses:
        return statuses == [200] * NUM_PERMITS + [429]
