"""The front without Ray, between a client and a replica that are both sockets here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from server.replicas import front
from tests.e2e.launched import free_port
from tests.replicas.fixed_front import FixedHandle, serve

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"index":1}\n\n'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body, of whichever framing."""
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    if b"content-length:" in lower:
        return head, await reader.readexactly(int(lower.split(b"content-length:")[1].split(b"\r\n")[0]))
    body = b""
    while b"transfer-encoding: chunked" in lower and (size := int(await reader.readline(), 16)):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return head, body


@contextlib.asynccontextmanager
async def replica(answer: Answer) -> AsyncIterator[str]:
    """The address of a server that answers each connection so."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=1 << 24)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@contextlib.asynccontextmanager
async def connected(handle: FixedHandle) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a front before the replicas of `handle`."""
    port = free_port()
    runner = await serve(handle, port)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await runner.cleanup()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head, body = await read_request(reader)
    answer = head + body
    writer.write(b"HTTP/1.1 200 OK\r\nx-some-Case: 1\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)
    await writer.drain()


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def ask(handle: FixedHandle, request: bytes) -> bytes:
    """The whole answer to a request that closes its connection."""
    async with connected(handle) as (reader, writer):
        writer.write(request)
        return await reader.read()


@pytest.mark.parametrize("size", [0, 10, front.MAX_READ_BYTES, front.MAX_READ_BYTES + 1, 5_000_000])
async def test_a_body_of_any_size_arrives_with_its_length_and_headers(size: int) -> None:
    async with replica(echo) as address:
        body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        answer = await ask(FixedHandle(address), post("/a%2Fb?c=%20d", body, "content-encoding: gzip", "x-y: \xe9"))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"\r\nx-some-case: 1\r\n" in head and b"server:" not in head
    seen_head, _, seen_body = rest.partition(b"\r\n\r\n")
    assert seen_head.startswith(b"POST /a%2Fb?c=%20d HTTP/1.1\r\n")
    assert b"content-length: %d" % size in seen_head.lower() and b"content-encoding: gzip" in seen_head
    assert b"user-agent" not in seen_head.lower() and b"accept" not in seen_head.lower()
    assert seen_body == body


async def test_a_body_in_chunks_that_come_slowly_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "READ_TIMEOUT_S", 0.05)
    async with replica(echo) as address, connected(FixedHandle(address)) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in (b'{"inputs"', b': "slow', b'"}'):
            writer.write(chunk(part))
            await asyncio.sleep(0.1)
        writer.write(chunk(b""))
        assert (await reader.read()).endswith(b'{"inputs": "slow"}')


async def test_events_pass_one_by_one() -> None:
    may_go_on = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(EVENT))
        await may_go_on.wait()
        writer.write(chunk(EVENT) + chunk(b""))

    async with replica(answer) as address, connected(FixedHandle(address)) as (reader, writer):
        writer.write(post("/generate_stream", b"{}"))
        await reader.readuntil(EVENT)
        may_go_on.set()
        assert (await reader.read()).endswith(EVENT + b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("last", [EVENT, EVENT[:9]])
async def test_a_stream_whose_replica_dies_ends_with_an_error_event(last: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(EVENT) + chunk(last))

    async with replica(answer) as address:
        handle = FixedHandle(address)
        stream = await ask(handle, post("/generate_stream", b"{}"))
    assert stream.count(b'"error_type":"generation"}\n\n') == 1 and stream.endswith(b"\r\n0\r\n\r\n")
    assert handle.num_open == 0


async def test_a_plain_answer_whose_replica_dies_is_broken_off() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")

    async with replica(answer) as address, connected(FixedHandle(address)) as (reader, writer):
        writer.write(post("/generate", b"{}"))
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(100)


async def test_a_replica_that_dies_before_its_answer_fails_the_request_once() -> None:
    num_requests = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_requests
        await read_request(reader)
        num_requests += 1

    async with replica(answer) as address:
        seen = await ask(FixedHandle(address), post("/generate", b"{}"))
    assert seen.startswith(b"HTTP/1.1 424 ") and seen.endswith(b'"error_type":"generation"}')
    assert num_requests == 1


@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_a_request_that_reached_nobody_goes_to_another_replica(size: int) -> None:
    async with replica(echo) as address:
        nobody = f"127.0.0.1:{free_port()}"
        handle = FixedHandle(nobody, nobody, address)
        answer = await ask(handle, post("/generate", b"x" * size))
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n" + b"x" * size)
    assert handle.num_open == 0


async def test_a_client_that_leaves_ends_its_lease_and_the_replicas_work() -> None:
    is_left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(EVENT))
        assert await reader.read() == b""
        is_left.set()

    async with replica(answer) as address:
        handle = FixedHandle(address)
        async with connected(handle) as (reader, writer):
            writer.write(post("/generate_stream", b"{}"))
            await reader.readuntil(EVENT)
            assert handle.num_open == 1
            writer.close()
            await asyncio.wait_for(is_left.wait(), 5)
    assert handle.num_open == 0


async def test_without_a_replica_a_probe_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "PROBE_TIMEOUT_S", 0.1)
    handle = FixedHandle(None)
    answer = await ask(handle, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 ") and answer.endswith(b'"error_type":"healthcheck"}')
    assert handle.num_open == 0


@pytest.mark.parametrize("target", ["http://front.example:81/a%2Fb?c=%20d", "//x/y"])
async def test_a_proxys_whole_url_is_its_path_for_the_replica(target: str) -> None:
    async with replica(echo) as address:
        answer = await ask(FixedHandle(address), post(target, b"{}"))
    path = target.removeprefix("http://front.example:81")
    assert f"\r\n\r\nPOST {path} HTTP/1.1\r\n".encode() in answer
