"""A client's end of HTTP/1.1: whole answers, streams chunk by chunk, and every way to leave."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Leaving(enum.Enum):
    """How a client leaves."""

    CLOSE = "close"
    RESET = "reset"
    HALF_CLOSE = "half-close"
    """It says that it will send no more, and goes a moment later."""


@dataclass(frozen=True)
class Answer:
    """An answer that was read to its end."""

    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The events of a stream, without the last one of OpenAI's routes."""
        lines = [line.removeprefix(b"data:").strip() for line in self.body.split(b"\n") if line.startswith(b"data:")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]


def request(path: str, body: Any = None, *, length: int | None = None) -> bytes:
    """A whole request; `body` is sent as JSON unless it is bytes. `length`: what the head says."""
    method = "GET" if body is None else "POST"
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(data) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n\r\n"
    return head.encode() + data


class Connection:
    """One connection to the server."""

    def __init__(self, stream: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._socket = stream
        self._reader = reader
        self._writer = writer
        self.is_reusable = True

    @classmethod
    async def open(cls, port: int, *, receive_buffer: int | None = None) -> Connection:
        stream = socket.socket()
        stream.setblocking(False)
        if receive_buffer is not None:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(stream, ("127.0.0.1", port))
        except BaseException:
            stream.close()
            raise
        return cls(stream, *await asyncio.open_connection(sock=stream, limit=1 << 16))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def status(self) -> int:
        """Read the head. Raises ConnectionError if the server has closed."""
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        except asyncio.IncompleteReadError:
            raise ConnectionError from None
        self._is_chunked = b"transfer-encoding: chunked" in head
        self._length = 0 if self._is_chunked else int(head.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        self.is_reusable = b"connection: close" not in head
        return int(head.split()[1])

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body after `status`. Raises ConnectionError if it ends before its time."""
        try:
            if not self._is_chunked:
                yield await self._reader.readexactly(self._length)
                return
            while size := int(await self._reader.readline() or b"-1", 16):
                if size < 0:
                    raise ConnectionError
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readline()
        except asyncio.IncompleteReadError:
            raise ConnectionError from None

    async def answer(self) -> Answer:
        return Answer(await self.status(), b"".join([chunk async for chunk in self.chunks()]))

    async def bytes(self, max_bytes: int) -> bytes:
        """Whatever has come; nothing at the end."""
        return await self._reader.read(max_bytes)

    async def leave(self, how: Leaving = Leaving.CLOSE) -> None:
        if how is Leaving.HALF_CLOSE and not self._writer.is_closing():
            with contextlib.suppress(OSError):
                self._writer.write_eof()
                await asyncio.sleep(0.01)
        self.close(is_reset=how is Leaving.RESET)

    def close(self, *, is_reset: bool = False) -> None:
        if is_reset and not self._writer.is_closing():
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._writer.transport.abort()


async def ask(port: int, path: str, body: Any = None) -> Answer:
    """One request on a connection of its own."""
    connection = await Connection.open(port)
    try:
        await connection.send(request(path, body))
        return await connection.answer()
    finally:
        connection.close()
