"""The dashboard's stream at the front, without Ray: all figures, the key, replicas that end or are silent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from server.replicas import figures
from server.replicas.figures import EVENTS_PATH
from server.replicas.front import Front
from tests.e2e.launched import free_port
from tests.replicas.fixed_front import FixedHandle
from tests.replicas.test_front import STREAM_HEAD, chunk, connected, read_request, replica

KEY = b"Bearer s3cret"


class Fleet(FixedHandle):
    """A handle of replicas by name; one of the calls to all of them fails."""

    def __init__(self, **places: str) -> None:
        super().__init__(next(iter(places.values())))
        self.places = places

    def broadcast(self, method: str) -> Fleet:
        assert method == "place"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        return [*self.places.items(), RuntimeError("it is just ending")]


class Server:
    """A replica's server: says who may have its figures, and streams them until `is_over`."""

    def __init__(self, running: int) -> None:
        self.running = running
        self.num_open = 0
        self.is_over = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        method, path = head.split(b" ")[:2]
        if path != EVENTS_PATH.encode() or KEY not in head:
            writer.write(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n")
        elif method == b"HEAD":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        else:
            await self._stream(reader, writer)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        try:
            writer.write(STREAM_HEAD)
            while not (self.is_over.is_set() or reader.at_eof()):
                line = json.dumps({"replicas": {"server": {"requests_running": self.running}}})
                writer.write(chunk(f"data: {line}\n\n".encode()))
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 0.02)
        finally:
            self.num_open -= 1


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "PERIOD_S", 0.02)
    monkeypatch.setattr(figures, "FIND_S", 0.05)


def ask(key: bytes = KEY) -> bytes:
    return b"GET %s HTTP/1.1\r\nhost: x\r\nauthorization: %s\r\n\r\n" % (EVENTS_PATH.encode(), key)


async def lines(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    while line := await reader.readline():
        if line.startswith(b"data: "):
            yield json.loads(line[len(b"data: ") :])["replicas"]


async def until(reader: asyncio.StreamReader, expected: dict[str, Any]) -> None:
    async with asyncio.timeout(5):
        async for replicas in lines(reader):
            if {name: told["requests_running"] for name, told in replicas.items()} == expected:
                return


async def gone(*servers: Server) -> None:
    """Return once nobody watches these servers."""
    async with asyncio.timeout(5):
        while any(server.num_open for server in servers):
            await asyncio.sleep(0.01)


async def test_all_replicas_are_in_a_line_and_are_watched_once_for_all() -> None:
    first, second = Server(3), Server(4)
    async with replica(first.answer) as one, replica(second.answer) as two:
        handle = Fleet(b=two, a=one)
        async with connected(handle) as (reader, writer):
            writer.write(ask())
            await until(reader, {"a": 3, "b": 4})
            assert (first.num_open, second.num_open) == (1, 1)
            assert handle.num_open == 0, "a dashboard is no request of a replica"
        await gone(first, second)


async def test_without_the_key_the_answer_is_the_replicas() -> None:
    server = Server(1)
    async with replica(server.answer) as address, connected(Fleet(a=address)) as (reader, writer):
        writer.write(ask(b"Bearer other"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401 ")
    assert server.num_open == 0


async def test_a_body_that_a_client_sends_along_is_announced_to_no_replica() -> None:
    """A replica would wait for it, and take the next request on that connection for it."""
    server = Server(3)
    async with replica(server.answer) as address, connected(Fleet(a=address)) as (reader, writer):
        writer.write(ask().removesuffix(b"\r\n") + b"content-length: 5\r\n\r\nhello")
        await until(reader, {"a": 3})


async def test_a_replica_that_ends_has_no_figures_and_a_new_one_is_found() -> None:
    first, second, third = Server(1), Server(2), Server(3)
    async with replica(first.answer) as one, replica(second.answer) as two, replica(third.answer) as three:
        handle = Fleet(a=one, b=two)
        async with connected(handle) as (reader, writer):
            writer.write(ask())
            await until(reader, {"a": 1, "b": 2})
            handle.places = {"a": one, "c": three}
            second.is_over.set()
            await until(reader, {"a": 1, "c": 3})


async def test_a_silent_replica_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SILENCE_S", 0.2)
    speaking, silent = Server(1), Server(2)

    async def fall_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        line = json.dumps({"replicas": {"server": {"requests_running": 2}}})
        writer.write(STREAM_HEAD + chunk(f"data: {line}\n\n".encode()))
        await silent.is_over.wait()

    async with replica(speaking.answer) as one, replica(fall_silent) as two:
        async with connected(Fleet(a=one, b=two)) as (reader, writer):
            writer.write(ask())
            await until(reader, {"a": 1, "b": 2})
            await until(reader, {"a": 1})
        silent.is_over.set()


async def test_an_open_dashboard_does_not_hold_up_the_end() -> None:
    server = Server(1)
    async with replica(server.answer) as address:
        port = free_port()
        front = Front(Fleet(a=address), is_strict=False)
        runner = front.runner(drain_s=60)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ask())
        await until(reader, {"a": 1})
        async with asyncio.timeout(10):
            await runner.cleanup()
            assert (await reader.read()).endswith(b"0\r\n\r\n")
        writer.close()
        await gone(server)
