"""The kinds of things that clients do, and how each may end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak import bodies
from benchmarks.soak.wire import Answer, Connection, Leaving, request

OTHER_ANSWER = "another answer than the first time"
LEFT = "left"
REFUSAL_STATUSES = (400, 404, 405, 422)
MAX_STREAM_TOKENS = 100
SLOW_STREAM_TOKENS = 40
SLOW_READ_S = 0.05
SLOW_READ_BYTES = 400


@dataclass
class Repeats:
    """The requests that are asked again and again, and their first answers."""

    calls: Sequence[bodies.Call]
    first: dict[int, Any] = field(default_factory=dict)

    def outcome(self, index: int, answer: Answer) -> str:
        if answer.status != 200:
            return str(answer.status)
        essence = bodies.essence(answer)
        return "200" if self.first.setdefault(index, essence) == essence else OTHER_ANSWER


class Client:
    """Someone who uses one connection for many requests, and opens another when that is gone."""

    def __init__(self, port: int, window: int, repeats: Repeats, chance: random.Random) -> None:
        self.port = port
        self.window = window
        """Tokens of a prompt and its answer."""
        self.repeats = repeats
        self.chance = chance
        self._connection: Connection | None = None

    async def connection(self) -> Connection:
        if self._connection is None or not self._connection.is_reusable:
            self.leave_at_once()
            self._connection = await Connection.open(self.port)
        return self._connection

    async def ask(self, call: tuple[str, Any]) -> Answer:
        connection = await self.connection()
        connection.is_reusable = False  # unless the answer comes to its end and says so
        await connection.send(request(*call))
        return await connection.answer()

    async def status(self, call: tuple[str, Any]) -> str:
        return str((await self.ask(call)).status)

    async def leave(self) -> str:
        if self._connection is not None:
            await self._connection.leave(self.chance.choice(list(Leaving)))
            self._connection = None
        return LEFT

    def leave_at_once(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def repeat_a_request(client: Client) -> str:
    index = client.chance.randrange(len(client.repeats.calls))
    return client.repeats.outcome(index, await client.ask(client.repeats.calls[index]))


def asking(make: Callable[[random.Random], bodies.Call]) -> Act:
    async def act(client: Client) -> str:
        return await client.status(make(client.chance))

    return act


async def send_a_long_prompt(client: Client) -> str:
    return await client.status(bodies.long_prompt(client.chance, client.window))


async def drop_a_stream(client: Client) -> str:
    connection = await client.connection()
    num_tokens = client.chance.randint(1, MAX_STREAM_TOKENS)
    await connection.send(request(*bodies.long_stream(client.chance, num_tokens)))
    if num_left := client.chance.randint(0, num_tokens):
        status = await connection.status()
        if status != 200:
            return str(status)
        async for _ in connection.chunks():
            num_left -= 1
            if not num_left:
                break
    return await client.leave()


async def leave_before_the_answer(client: Client) -> str:
    connection = await client.connection()
    make = client.chance.choice([bodies.own_chat, bodies.own_tools, bodies.own_grammar, bodies.own_completion])
    await connection.send(request(*make(client.chance)))
    await asyncio.sleep(client.chance.choice([0, 0.001, 0.01, 0.1, 1]))
    return await client.leave()


async def cancel_an_upload(client: Client) -> str:
    connection = await client.connection()
    text = bodies.prompt(client.chance, client.chance.choice([5, 50, 20_000]))
    data = request("/generate", {"inputs": text, "parameters": bodies.SMALL})
    await connection.send(data[: client.chance.randrange(1, len(data))])
    await asyncio.sleep(client.chance.choice([0, 0.01, 0.5]))
    return await client.leave()


async def read_slowly(client: Client) -> str:
    """A whole stream through the smallest buffer that there is."""
    connection = await Connection.open(client.port, receive_buffer=1)
    try:
        await connection.send(request(*bodies.long_stream(client.chance, SLOW_STREAM_TOKENS)))
        tail = b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            data = await connection.bytes(SLOW_READ_BYTES)
            if not data:
                return "none"
            tail = (tail + data)[-7:]
            await asyncio.sleep(SLOW_READ_S)
        return "200"
    finally:
        connection.close()


async def be_refused(client: Client) -> str:
    path, body = client.chance.choice(bodies.REFUSALS)
    answer = await client.ask((path, body))
    return "refused" if answer.status in REFUSAL_STATUSES else f"{answer.status} for {body} at {path}"


async def look_at_a_page(client: Client) -> str:
    return await client.status((client.chance.choice(bodies.PAGES), None))


Act = Callable[[Client], Awaitable[str]]


@dataclass(frozen=True)
class Kind:
    """One row of the mix."""

    name: str
    weight: int
    act: Act
    good: str = "200"
    """The outcome, if nothing is wrong."""


KINDS = (
    Kind("repeated requests", 24, repeat_a_request),
    Kind("chats", 8, asking(bodies.own_chat)),
    Kind("tools", 6, asking(bodies.own_tools)),
    Kind("grammars", 8, asking(bodies.own_grammar)),
    Kind("completions, n", 5, asking(bodies.own_completion)),
    Kind("best_of", 3, asking(bodies.own_best_of)),
    Kind("long prompts", 3, send_a_long_prompt),
    Kind("texts to tokenize", 4, asking(bodies.text_call)),
    Kind("streams dropped", 12, drop_a_stream, LEFT),
    Kind("left before the answer", 8, leave_before_the_answer, LEFT),
    Kind("uploads cancelled", 8, cancel_an_upload, LEFT),
    Kind("slow readers", 3, read_slowly),
    Kind("refusals", 10, be_refused, "refused"),
    Kind("pages", 4, look_at_a_page),
)
