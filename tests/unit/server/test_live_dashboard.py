"""The dashboard's stream: the same bytes for all, made only while somebody watches; its key, its readers, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from engine.link.messages import EngineStats
from server.answers import broadcast
from server.answers.broadcast import Broadcast, Reader
from server.app import create_app
from server.errors import OverloadedError, UnhealthyError
from server.routes import dashboard
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, make_config, running_server, url_of

PATH = "/dashboard/events"


class Source:
    """Events that the test lets out one by one."""

    def __init__(self) -> None:
        self.num_open = 0
        self.num_opened = 0
        self.next: asyncio.Queue[bytes | Exception] = asyncio.Queue()

    async def events(self) -> AsyncGenerator[bytes]:
        self.num_open += 1
        self.num_opened += 1
        try:
            while True:
                item = await self.next.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.num_open -= 1

    async def let_out(self, *items: bytes | Exception) -> None:
        for item in items:
            self.next.put_nowait(item)
            await settle()


async def settle() -> None:
    """Let every task go on as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def taken(reader: Reader) -> list[bytes]:
    """All events of a reader whose events have ended."""
    return [event async for event in reader.events()]


async def test_all_readers_get_the_very_same_bytes() -> None:
    source = Source()
    shared = Broadcast(source.events)
    readers = [shared.join() for _ in range(10)]
    await settle()
    line = bytes([1, 2, 3])
    await source.let_out(line)
    got = [await anext(reader.events()) for reader in readers]
    assert all(event is line for event in got)
    assert source.num_opened == 1


async def test_nothing_is_made_without_a_reader() -> None:
    source = Source()
    shared = Broadcast(source.events)
    await settle()
    assert source.num_opened == 0
    first, second = shared.join(), shared.join()
    await settle()
    shared.leave(first)
    await settle()
    assert source.num_open == 1
    shared.leave(second)
    shared.leave(second)
    await settle()
    assert source.num_open == 0
    shared.join()
    await settle()
    assert (source.num_open, source.num_opened) == (1, 2)


async def test_a_slow_reader_is_dropped_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = Source()
    shared = Broadcast(source.events)
    slow, fast = shared.join(), shared.join()
    events = fast.events()
    for number in range(2 * broadcast.MAX_WAITING):
        await source.let_out(b"%d" % number)
        assert slow.num_waiting <= broadcast.MAX_WAITING
        assert await anext(events) == b"%d" % number
    assert await taken(slow) == []
    assert len([record for record in caplog.records if "dropping it" in record.message]) == 1


async def test_there_are_only_so_many_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "MAX_READERS", 2)
    shared = Broadcast(Source().events)
    first, _ = shared.join(), shared.join()
    with pytest.raises(OverloadedError):
        shared.join()
    shared.leave(first)
    shared.join()


async def test_all_end_when_it_is_closed_and_nobody_joins_any_more() -> None:
    source = Source()
    shared = Broadcast(source.events)
    readers = [shared.join() for _ in range(3)]
    await settle()
    shared.close()
    assert [await taken(reader) for reader in readers] == [[], [], []]
    await settle()
    assert source.num_open == 0
    with pytest.raises(UnhealthyError):
        shared.join()


async def test_readers_end_when_no_events_can_be_made_and_the_next_ones_try_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Source()
    shared = Broadcast(source.events)
    reader = shared.join()
    await settle()
    await source.let_out(KeyError("planted"))
    assert await taken(reader) == []
    assert "planted" in caplog.text
    again = shared.join()
    await settle()
    await source.let_out(b"x")
    assert await anext(again.events()) == b"x"


# ---- the routes ----


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "PERIOD_S", 0.01)


@pytest.fixture
def keyed(engine: FakeEngine, model_folder: Path) -> FastAPI:
    return create_app(engine, make_config(api_key="s3cret"), TextTokenizer.from_folder(str(model_folder), 1))


@pytest.fixture
def keyed_url(keyed: FastAPI, _fast: None) -> Iterator[str]:
    with running_server(keyed) as server:
        yield url_of(server)


@contextlib.asynccontextmanager
async def stream(client: httpx.AsyncClient, **headers: str) -> AsyncIterator[AsyncIterator[str]]:
    async with client.stream("GET", PATH, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        yield response.aiter_lines()


async def read_data(lines: AsyncIterator[str]) -> str:
    """The next line that has data."""
    async for line in lines:
        if line.startswith("data: "):
            return line.removeprefix("data: ")
    raise AssertionError("the stream has ended")


@pytest.mark.parametrize("headers", [{"authorization": "Bearer s3cret"}, {"x-api-key": "s3cret"}])
async def test_the_stream_needs_the_key_and_the_page_none(
    keyed_url: str, keyed: FastAPI, engine: FakeEngine, headers: dict[str, str]
) -> None:
    engine.stats = EngineStats(num_running=3)
    async with httpx.AsyncClient(base_url=keyed_url) as client:
        assert (await client.get("/dashboard")).status_code == 200
        for wrong in ({}, {"authorization": "Bearer other"}):
            for method in ("GET", "HEAD"):
                assert (await client.request(method, PATH, headers=wrong)).status_code == 401
        asked = await client.head(PATH, headers=headers)
        assert (asked.status_code, asked.headers["content-type"]) == (200, "text/event-stream")
        assert keyed.state.figures._readers == set()
        async with stream(client, **headers) as lines:
            for _ in range(3):
                replicas = json.loads(await read_data(lines))["replicas"]
                assert replicas["server"]["requests_running"] == 3


async def test_no_sample_is_taken_when_the_last_client_has_gone(keyed_url: str, keyed: FastAPI) -> None:
    key = {"authorization": "Bearer s3cret"}
    async with httpx.AsyncClient(base_url=keyed_url) as client:
        async with stream(client, **key) as first, stream(client, **key) as second:
            assert await read_data(first) and await read_data(second)
            assert keyed.state.figures._sharing is not None
        deadline = asyncio.get_running_loop().time() + 5
        while keyed.state.figures._sharing is not None:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)


async def test_a_client_that_does_not_read_is_dropped_and_the_others_go_on(
    keyed_url: str, keyed: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lines are longer than true ones: the kernel alone takes thousands of those."""
    monkeypatch.setattr(dashboard, "event", lambda line: b"data: %s\n\n" % (b"x" * 50_000))
    readers = keyed.state.figures._readers
    with socket.socket() as silent:
        silent.connect(("127.0.0.1", int(keyed_url.rpartition(":")[2])))
        silent.sendall(f"GET {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer s3cret\r\n\r\n".encode())
        async with (
            httpx.AsyncClient(base_url=keyed_url) as client,
            stream(client, authorization="Bearer s3cret") as lines,
            asyncio.timeout(10),
        ):
            while len(readers) < 2:
                await read_data(lines)
            while len(readers) == 2:
                await read_data(lines)
            for _ in range(2 * broadcast.MAX_WAITING):
                await read_data(lines)
            assert len(readers) == 1


async def test_one_reader_too_many_is_told_so(keyed_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "MAX_READERS", 1)
    key = {"authorization": "Bearer s3cret"}
    async with httpx.AsyncClient(base_url=keyed_url) as client, stream(client, **key):
        response = await client.get(PATH, headers=key)
        assert (response.status_code, response.json()["error_type"]) == (429, "overloaded")


async def test_an_open_dashboard_does_not_hold_up_the_end(keyed_url: str, engine: FakeEngine) -> None:
    async with (
        httpx.AsyncClient(base_url=keyed_url) as client,
        stream(client, authorization="Bearer s3cret") as lines,
        asyncio.timeout(5),
    ):
        await read_data(lines)
        engine.is_stopping = True
        assert len([line async for line in lines if line]) < broadcast.MAX_WAITING


async def test_the_page_is_a_page(client: httpx.AsyncClient) -> None:
    response = await client.get("/dashboard")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>pytgi dashboard" in response.text
