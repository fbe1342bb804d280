"""What only a real connection shows: a client that leaves, silence, a server that stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI

from server.sse import EventStream
from tests.unit.server.harness import FakeEngine, events_of, one_by_one, running_server, url_of

REQUESTS = [
    ("/generate", {"inputs": "x"}),
    ("/generate_stream", {"inputs": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
]


async def until(condition: Callable[[], object], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("path", "body"), REQUESTS)
async def test_client_gone_means_abort(
    base_url: str, engine: FakeEngine, app: FastAPI, path: str, body: dict[str, object]
) -> None:
    engine.script.stall_after = 1
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(timeout=0.2) as client:
            await client.post(base_url + path, json=body)
    await until(lambda: engine.aborted)
    assert engine.aborted == [engine.requests[0].request_id]
    assert app.state.service._admission.num_free == 128


async def test_client_that_stops_reading_midway_means_abort(base_url: str, engine: FakeEngine) -> None:
    engine.script.pause_s = 0.05
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", f"{base_url}/generate_stream", json={"inputs": "x"}) as response,
    ):
        async for _ in response.aiter_bytes():
            break
    await until(lambda: engine.aborted)


async def test_events_leave_one_by_one(base_url: str, engine: FakeEngine) -> None:
    engine.script.pause_s = 0.05
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", f"{base_url}/generate_stream", json={"inputs": "x"}) as response,
    ):
        assert response.headers["transfer-encoding"] == "chunked"
        assert "server" not in response.headers
        chunks = [chunk async for chunk in response.aiter_raw()]
    assert len(chunks) == 5


async def test_silence_is_kept_alive(app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "keep_alive_s", 0.1)
    engine.script.pause_s = 0.25
    with running_server(app) as server:
        async with httpx.AsyncClient() as client:
            response = await client.post(f"{url_of(server)}/generate_stream", json={"inputs": "x"})
    frames = response.content.split(b"\n\n")
    kinds = "".join("." if frame == b":" else "e" for frame in frames[:-1])
    assert kinds == "..e" * 5  # an event starts the timer again
    assert len(events_of(response.content.replace(b":\n\n", b""))) == 5


async def test_sigterm_lets_a_stream_finish(app: FastAPI, engine: FakeEngine) -> None:
    engine.script.pause_s = 0.3  # in all longer than the half second at which sse-starlette looks for the signal
    with running_server(app) as server:
        before = signal.signal(signal.SIGTERM, server.handle_exit)
        try:
            async with httpx.AsyncClient() as client:
                request = asyncio.create_task(client.post(f"{url_of(server)}/generate_stream", json={"inputs": "x"}))
                await until(lambda: engine.requests)
                os.kill(os.getpid(), signal.SIGTERM)
                response = await request
        finally:
            signal.signal(signal.SIGTERM, before)
        assert server.should_exit
    assert events_of(response.content)[-1]["generated_text"] == "Hello, world!"


async def test_client_that_never_reads_is_given_up(
    app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(EventStream, "send_timeout_s", 0.3)
    engine.script.events = one_by_one([5] * 200_000)
    body = b'{"inputs":"x"}'
    head = f"POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    with running_server(app) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(url_of(server).rsplit(":", 1)[1])))
        client.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        await until(lambda: engine.aborted, timeout_s=30)
        await until(lambda: app.state.service._admission.num_free == 128)
    assert "has not read" in caplog.text
    assert "Traceback" not in caplog.text
