"""What only a real connection shows: a client that leaves, silence, a server that stops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from server.answers.sse import EventStream
from server.edge.connection import Connection
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
    assert app.state.service.admission.num_free == 128


async def test_client_that_stops_reading_midway_means_abort(base_url: str, engine: FakeEngine) -> None:
    engine.script.pause_s = 0.05
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", f"{base_url}/generate_stream", json={"inputs": "x"}) as response,
    ):
        async for _ in response.aiter_bytes():
            break
    await until(lambda: engine.aborted)


def request(path: str, body: bytes = b'{"inputs":"x"}') -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def connected(base_url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(base_url.rsplit(":", 1)[1])))


def received(client: socket.socket) -> bytes:
    """Read everything until the server closes, or resets the connection as it leaves bytes of the client unread."""
    client.settimeout(5)
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(1 << 16):
            data += piece
    return bytes(data)


async def one_answer(client: socket.socket) -> tuple[bytes, bytes]:
    """The head and the body of the next answer, which has a length."""
    client.settimeout(5)
    data = b""
    while True:
        data += await asyncio.to_thread(client.recv, 1 << 16)
        head, end, body = data.partition(b"\r\n\r\n")
        if end and len(body) == int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]):
            return head, body


async def test_a_client_that_leaves_several_requests_behind_means_abort(
    base_url: str, engine: FakeEngine, app: FastAPI
) -> None:
    engine.script.stall_after = 1
    with connected(base_url) as client:
        client.sendall(request("/generate_stream") + request("/generate") * 3)
        await until(lambda: engine.requests)
    await until(lambda: engine.aborted)
    assert len(engine.requests) == 1, "what nobody waits for is not begun"
    assert app.state.service.admission.num_free == 128


async def test_several_requests_at_once_are_answered_in_order(base_url: str) -> None:
    with connected(base_url) as client:
        client.sendall(request("/generate") + request("/generate", b"{") + b"GET /nope HTTP/1.0\r\n\r\n")
        answer = received(client)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400", b"404"]


@pytest.mark.parametrize("endless", [b"a: bbbbbbbb\r\n" * 1000, b"a" * 10_000])
async def test_a_head_without_end_is_refused(base_url: str, endless: bytes) -> None:
    with connected(base_url) as client:
        client.sendall(b"GET /info HTTP/1.1\r\n")
        answer = asyncio.create_task(asyncio.to_thread(received, client))
        for _ in range(7):  # the last part is over the limit; more, and a reset could overtake the answer
            await asyncio.sleep(0.02)
            client.sendall(endless)
        assert (await answer).startswith(b"HTTP/1.1 431 ")


async def test_trailers_without_end_are_refused(base_url: str) -> None:
    head = b"POST /generate HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with connected(base_url) as client:
        client.sendall(head + b"2\r\n{}\r\n0\r\n")
        answer = asyncio.create_task(asyncio.to_thread(received, client))
        for _ in range(7):
            await asyncio.sleep(0.02)
            client.sendall(b"a: bbbbbbbb\r\n" * 1000)
        assert await answer == b""


async def test_a_large_body_is_no_head(base_url: str) -> None:
    with connected(base_url) as client:
        body = b'{"inputs":"x"}' + b" " * 19_000
        client.sendall(request("/generate", body) * 8 + b"GET /nope HTTP/1.0\r\n\r\n")
        answer = await asyncio.to_thread(received, client)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200"] * 8 + [b"404"]


async def test_bodies_that_are_parsed_in_many_turns_are_read_to_their_ends(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading is held in between, whatever the request that waits for its body asks for; and it goes on."""
    monkeypatch.setattr("server.edge.connection.FEED_S", 0.0)
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with connected(base_url) as client:
        for _ in range(2):
            body = b"1\r\n \r\n" * 15_000 + b'e\r\n{"inputs":"x"}\r\n0\r\n\r\n'
            await asyncio.to_thread(client.sendall, head + body)
            answer, _ = await one_answer(client)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_connection_is_used_again(base_url: str) -> None:
    with connected(base_url) as client:
        for _ in range(3):
            client.sendall(request("/generate"))
            head, _ = await one_answer(client)
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"connection:" not in head


async def test_a_reset_connection_is_forgotten(base_url: str) -> None:
    with connected(base_url) as client:
        client.sendall(request("/generate"))
        await one_answer(client)
        assert num_connections() == 1
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await until(lambda: num_connections() == 0, timeout_s=2)


def num_connections() -> int:
    """The number of connections that this process keeps in memory."""
    gc.collect()
    return sum(type(thing) is Connection for thing in gc.get_objects())


async def test_too_large_a_body_is_refused_before_it_comes(base_url: str, engine: FakeEngine) -> None:
    head = request("/generate", b" " * 20_001)[:-20_001]
    with connected(base_url) as client:
        client.sendall(head)
        refusal, text = await one_answer(client)
        assert refusal.startswith(b"HTTP/1.1 413 ")
        assert text == b"Failed to buffer the request body: length limit exceeded"
        client.sendall(b" " * 20_001 + request("/generate"))  # it may come yet; the next request is answered
        assert (await one_answer(client))[0].startswith(b"HTTP/1.1 200 ")
    assert len(engine.requests) == 1


async def test_permits_are_given_back_when_an_answer_is_read(app: FastAPI, engine: FakeEngine) -> None:
    engine.script.pause_s = 0.1
    app.state.service.admission.num_free = 2
    with running_server(app) as server:
        async with httpx.AsyncClient(base_url=url_of(server)) as client:
            for _ in range(2):
                answers = await asyncio.gather(*(client.post(path, json=body) for path, body in REQUESTS[:3]))
                assert sorted(answer.status_code for answer in answers) == [200, 200, 429]
    assert app.state.service.admission.num_free == 2


async def test_a_client_that_leaves_is_noticed_by_a_busy_loop() -> None:
    """The next token is there in every turn of the loop, so that the stream's task is always about to run."""
    loop = asyncio.get_running_loop()
    waiting = loop.create_future()
    deadline = time.monotonic() + 5

    def turn() -> None:
        if not waiting.done():
            waiting.set_result(None)
        if time.monotonic() < deadline:
            loop.call_soon(turn)

    async def tokens() -> AsyncIterator[bytes]:
        nonlocal waiting
        while True:
            waiting = loop.create_future()
            await waiting
            yield b"data: {}\n\n"

    async def leave() -> Message:
        await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        assert time.monotonic() < deadline

    loop.call_soon(turn)
    await EventStream(tokens(), {}, lambda: None)({"type": "http", "method": "POST"}, leave, send)
    deadline = 0.0


def exchange(base_url: str, request: bytes) -> tuple[list[str], bytes]:
    """The lines of the head and the body of the answer; the connection closes after it."""
    host, port = base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request)
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode().lower().split("\r\n"), body


def posted(path: str, content: bytes, start: str, *headers: str) -> bytes:
    lines = [f"POST {path} {start}", "content-type: application/json", f"content-length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


@pytest.mark.parametrize("headers", [(), ("connection: keep-alive",)])
@pytest.mark.parametrize(("path", "key"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")])
async def test_an_old_client_gets_no_chunks(base_url: str, path: str, key: str, headers: tuple[str, ...]) -> None:
    said = {"messages": '[{"role":"user","content":"x"}]', "prompt": '"x"'}[key]
    content = f'{{"{key}":{said},"stream":true}}'.encode()
    head, body = await asyncio.to_thread(exchange, base_url, posted(path, content, "HTTP/1.0", *headers))
    assert [line for line in head if line.startswith("connection")] == ["connection: close"]
    assert not any(line.startswith("transfer-encoding") for line in head)
    assert body.endswith(b"data: [DONE]\n\n")
    assert len(events_of(body)) >= 5


async def test_a_plain_answer_to_an_old_client_has_its_length(base_url: str) -> None:
    request = posted("/generate", b'{"inputs":"x"}', "HTTP/1.0")
    head, body = await asyncio.to_thread(exchange, base_url, request)
    assert f"content-length: {len(body)}" in head
    assert head.count("connection: close") == 1
    assert body == b'{"generated_text":"Hello, world!"}'


async def test_an_answer_names_the_connection_once(base_url: str) -> None:
    content = b'{"inputs":"x"}'
    request = posted("/generate_stream", content, "HTTP/1.1", "host: x", "connection: close")
    head, body = await asyncio.to_thread(exchange, base_url, request)
    assert [line for line in head if line.startswith("connection")] == ["connection: close"]
    assert "transfer-encoding: chunked" in head
    assert body.endswith(b"0\r\n\r\n")


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
    engine.script.events = one_by_one([5] * 20_000)
    with running_server(app) as server, socket.socket() as client:
        # A connection takes this over from its listener; by default the kernel keeps megabytes of events.
        server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(url_of(server).rsplit(":", 1)[1])))
        client.sendall(request("/generate_stream"))
        await until(lambda: engine.aborted, timeout_s=30)
        await until(lambda: app.state.service.admission.num_free == 128)
    assert "has not read" in caplog.text
    assert "Traceback" not in caplog.text
