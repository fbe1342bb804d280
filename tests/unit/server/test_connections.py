"""All connections together: idle, dripping, unread ones end; new ones find a place."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from server.edge.connections import ConnectionLimits
from tests.unit.server.harness import FakeEngine, one_by_one, running_server, url_of
from tests.unit.server.test_connection import one_answer, received, request, until

INFO = b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.edge.connections.SWEEP_S", 0.05)


@contextlib.contextmanager
def limited(app: FastAPI, **limits: Any) -> Iterator[int]:
    """The port of a server with such limits."""
    with running_server(app, ConnectionLimits(**limits)) as server:
        # A connection takes this over from its listener; by default the kernel keeps megabytes of an answer.
        server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield int(url_of(server).rsplit(":", 1)[1])


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port))


async def end_of(client: socket.socket) -> bytes:
    return await asyncio.to_thread(received, client)


async def end_of_dripping(client: socket.socket) -> bytes:
    """What the server sends to a client that drips until there is something to read.

    A byte that meets a closed connection resets it, and what was not read by then may be lost.
    """
    while not (await asyncio.to_thread(select.select, [client], [], [], 0.05))[0]:
        client.sendall(b"x")
    return await end_of(client)


async def test_idle_connections_end(app: FastAPI) -> None:
    with limited(app, idle_s=0.2) as port, connect(port) as never_used, connect(port) as used:
        used.sendall(INFO)
        await one_answer(used)
        assert await end_of(never_used) == b""
        assert await end_of(used) == b""


async def test_a_dripping_head_is_refused(app: FastAPI) -> None:
    with limited(app, head_s=0.2) as port, connect(port) as client:
        client.sendall(INFO[:5])
        assert (await end_of_dripping(client)).startswith(b"HTTP/1.1 408 ")


async def test_what_drips_after_a_refusal_ends(app: FastAPI) -> None:
    with limited(app, head_s=0.2) as port, connect(port) as client:
        client.sendall(request("/generate", b" " * 20_001)[:-20_000])
        assert (await one_answer(client))[0].startswith(b"HTTP/1.1 413 ")
        assert await end_of_dripping(client) == b""


async def test_a_stream_may_be_silent(app: FastAPI, engine: FakeEngine) -> None:
    engine.script.pause_s = 0.3
    with limited(app, idle_s=0.1, head_s=0.1, unread_s=0.1) as port, connect(port) as client:
        client.sendall(request("/generate_stream").replace(b"host", b"connection: close\r\nhost"))
        assert (await end_of(client)).count(b"data:") == 5


async def test_the_oldest_idle_connection_gives_way(app: FastAPI, engine: FakeEngine) -> None:
    engine.script.stall_after = 1
    with limited(app, max_connections=3) as port, connect(port) as running, connect(port) as first:
        running.sendall(request("/generate_stream"))
        await until(lambda: engine.requests)
        with connect(port) as second, connect(port) as third:
            third.sendall(INFO)
            assert (await one_answer(third))[0].startswith(b"HTTP/1.1 200 ")
            assert await end_of(first) == b""
            second.sendall(INFO)
            assert (await one_answer(second))[0].startswith(b"HTTP/1.1 200 ")
        assert not engine.aborted, "what runs is left alone"


async def test_a_body_on_its_way_gives_way_when_nothing_is_idle(app: FastAPI) -> None:
    with limited(app, max_connections=1) as port, connect(port) as sending:
        sending.sendall(request("/generate", b" " * 9)[:-5])
        await asyncio.sleep(0.2)
        with connect(port) as other:
            other.sendall(INFO)
            assert (await one_answer(other))[0].startswith(b"HTTP/1.1 200 ")


async def test_a_client_that_reads_nothing_gives_way_when_all_others_run(app: FastAPI) -> None:
    with limited(app, max_connections=1, stalled_s=0.2) as port, connect(port) as hoarding:
        hoarding.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 200)
        answer = b"HTTP/1.1 503"
        while answer.startswith(b"HTTP/1.1 503"):  # until it has read nothing for so long
            with connect(port) as other, contextlib.suppress(ConnectionError):
                other.sendall(INFO)
                answer = (await one_answer(other))[0]
        assert answer.startswith(b"HTTP/1.1 200 ")


async def test_beyond_the_limit_the_refusal_has_words(app: FastAPI, engine: FakeEngine) -> None:
    engine.script.stall_after = 1
    with limited(app, max_connections=1) as port, connect(port) as running:
        running.sendall(request("/generate_stream"))
        await until(lambda: engine.requests)
        with connect(port) as other:
            await asyncio.sleep(0.1)
            other.sendall(INFO)
            answer = await end_of(other)
        assert answer.startswith(b"HTTP/1.1 503 ") and answer.endswith(b"Too many connections")
        running.close()
        await until(lambda: engine.aborted)
        with connect(port) as next_one:
            next_one.sendall(INFO)
            assert (await one_answer(next_one))[0].startswith(b"HTTP/1.1 200 ")


NUM_TOKENS = 10_000
"""An answer of half a megabyte."""


@contextlib.contextmanager
def unread_answers(port: int, number: int) -> Iterator[list[socket.socket]]:
    """Clients that ask for a large answer and do not read."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(number):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(request("/generate", b'{"inputs":"x","parameters":{"details":true}}'))
            clients.append(client)
        yield clients


def is_closed(client: socket.socket) -> bool:
    """Whether the server has ended the connection before its answer was read."""
    try:
        return len(received(client)) < 400_000
    except ConnectionError:
        return True


async def test_a_client_that_does_not_read_its_answer_is_given_up(
    app: FastAPI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script.events = one_by_one([5] * NUM_TOKENS)
    with limited(app, unread_s=0.3) as port, unread_answers(port, 1):
        await until(lambda: "has not read its answer" in caplog.text, timeout_s=30)


async def test_answers_that_wait_are_bounded_together(
    app: FastAPI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script.events = one_by_one([5] * NUM_TOKENS)
    with limited(app, max_unread_bytes=700_000) as port, unread_answers(port, 2) as clients:
        await until(lambda: "has not read its answer" in caplog.text, timeout_s=30)
        closed = await asyncio.gather(*(asyncio.to_thread(is_closed, client) for client in clients))
    assert sorted(closed) == [False, True]


async def test_requests_that_are_sent_ahead_wait_unparsed(app: FastAPI, engine: FakeEngine) -> None:
    """uvicorn would make an object for each of them at once."""
    engine.script.stall_after = 1
    with limited(app) as port, connect(port) as client:
        client.sendall(request("/generate") + INFO * 20_000)
        with contextlib.suppress(ConnectionError):
            assert await end_of(client) == b"", "too much to be kept"
    await until(lambda: len(engine.aborted) == len(engine.requests))
    assert app.state.service.admission.num_free == 128


async def test_requests_that_are_sent_ahead_are_answered(app: FastAPI) -> None:
    with limited(app) as port, connect(port) as client:
        client.sendall(INFO * 2_000 + b"GET /nope HTTP/1.0\r\n\r\n")
        assert (await end_of(client)).count(b"HTTP/1.1 200 OK") == 2_000
