"""Clients that behave badly, many at a time: `python -m tests.e2e.abuse PORT NUM_REQUESTS`.

A program of its own with a low priority: what it needs of a processor is not to be taken from the server, nor from the
clients whose latency is measured.
The last line of stdout is JSON: for each kind of abuse how often each status came ("none": closed without an answer).
The same requests on every run.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import socket
import struct
import sys
from collections.abc import Awaitable, Callable

TIMEOUT_S = 20.0
NUM_CLIENTS = 32
NUM_SLOW_READERS = 8
MAX_BODY_BYTES = 20_000
"""The server's `payload_limit`."""
PATHS = ("/generate", "/generate_stream", "/", "/v1/chat/completions")
RESET = struct.pack("ii", 1, 0)


class Abuser:
    """One connection and what is done with it."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self._port = port
        self._chance = chance

    async def open(self, *, receive_buffer: int | None = None) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        self._socket = sock
        self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=2048)

    def close(self) -> None:
        if self._chance.random() < 0.5 and not self._writer.is_closing():  # with a reset instead of an end
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._writer.transport.abort()

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def status(self) -> str:
        """The status of the next answer, which must be a plain one; it is read to its end."""
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        except (asyncio.IncompleteReadError, ConnectionError):
            return "none"
        if b"content-length: " in head:
            length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._reader.readexactly(length)
        return head.split()[1].decode()

    def path(self) -> str:
        return self._chance.choice(PATHS)

    def whole(self, num_tokens: int, *, is_stream: bool = False) -> bytes:
        """A request that nothing is wrong with."""
        path = self._chance.choice(PATHS[1:]) if is_stream else "/generate"
        return request(path, body(path, num_tokens))

    async def leaves_during_the_body(self) -> str:
        path = self.path()
        whole = request(path, body(path, 100))
        await self.send(whole[: self._chance.randrange(1, len(whole))])
        await asyncio.sleep(self._chance.choice([0, 0.02]))
        return "left"

    async def leaves_before_the_answer(self) -> str:
        await self.send(self.whole(500))
        await asyncio.sleep(self._chance.choice([0, 0.001, 0.05]))
        return "left"

    async def leaves_midstream(self) -> str:
        await self.send(self.whole(500, is_stream=True))
        for _ in range(self._chance.randrange(1, 20)):
            await self._reader.read(200)
        return "left"

    async def leaves_a_pipeline(self) -> str:
        await self.send(self.whole(500, is_stream=True) + self.whole(500) * 5)
        await self._reader.read(200)
        return "left"

    async def sends_a_pipeline(self) -> str:
        """Each request gets its answer, in order."""
        kinds = [
            (self.whole(2), "200"),
            (request("/generate", b"{"), "400"),
            (b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n", "200"),
        ]
        self._chance.shuffle(kinds)
        await self.send(b"".join(data for data, _ in kinds))
        statuses = [await self.status() for _ in kinds]
        return "in order" if statuses == [status for _, status in kinds] else f"out of order: {statuses}"

    async def truncates_json(self) -> str:
        path = self.path()
        whole = body(path, 5)
        return await self._ask(path, whole[: self._chance.randrange(len(whole))])

    async def names_another_type(self) -> str:
        return await self._ask(
            self.path(), b"{}", content_type=self._chance.choice(["text/plain", "", "\xff", "a/b/c;;=,"])
        )

    async def is_not_utf8(self) -> str:
        path = self.path()
        return await self._ask(path, body(path, 5).replace(b"hello", bytes(self._chance.choices(range(128, 256), k=9))))

    async def nests_deeply(self) -> str:
        depth = self._chance.choice([129, 1000, 9000])
        return await self._ask(self.path(), b'{"inputs":' + b"[" * depth + b"]" * depth + b"}")

    async def is_garbage(self) -> str:
        await self.send(
            self._chance.choice(
                [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\x00" * 99, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
            )
        )
        return await self.status()

    async def asks_for_nothing_there(self) -> str:
        method, path = self._chance.choice(
            [("PUT", "/generate"), ("GET", "/nope"), ("POST", "/%ff%00"), ("TRACE", "/info")]
        )
        await self.send(f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
        return await self.status()

    async def asks_for_an_upgrade(self) -> str:
        upgrade = (
            "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: aaaa\r\n"
        )
        await self.send(f"GET /info HTTP/1.1\r\nhost: x\r\n{upgrade}\r\n".encode())
        return await self.status()

    async def announces_too_little(self) -> str:
        """The server takes bytes beyond the stated length for the next request, which is broken."""
        whole = body("/generate", 5)
        await self.send(request("/generate", whole, length=str(len(whole) - 9)))
        return await self.status()

    async def announces_too_much(self) -> str:
        path = self.path()
        whole = body(path, 5)
        await self.send(request(path, whole, length=str(len(whole) + 9)))
        self._writer.write_eof()
        return await self.status()

    async def announces_nonsense(self) -> str:
        length = self._chance.choice(["-1", "1e9", "abc", "5\r\ncontent-length: 6", "9" * 30, "\u00b2"])
        await self.send(request(self.path(), b"{}", length=length))
        return await self.status()

    async def sends_too_much(self) -> str:
        return await self._ask(self.path(), b'{"inputs":"' + b"x" * MAX_BODY_BYTES + b'"}')

    async def sends_chunks_without_end(self) -> str:
        head = request(self.path(), b"", length=None)
        await self.send(head)
        answer = asyncio.create_task(self.status())
        while not answer.done():
            await self.send(b"3e8\r\n" + b" " * 1000 + b"\r\n")
            await asyncio.sleep(0)
        return await answer

    async def sends_headers_without_end(self) -> str:
        await self.send(b"GET /info HTTP/1.1\r\n")
        answer = asyncio.create_task(self.status())
        while not answer.done():
            await self.send(self._chance.choice([b"a: %s\r\n" % (b"b" * 5000), b"x" * 5000]))
            await asyncio.sleep(0)
        return await answer

    async def trickles_its_body(self) -> str:
        for byte in self.whole(2):
            await self.send(bytes([byte]))
            await asyncio.sleep(0.001)
        return await self.status()

    async def _ask(self, path: str, data: bytes, content_type: str = "application/json") -> str:
        await self.send(request(path, data, content_type=content_type))
        return await self.status()


Abuse = Callable[[Abuser], Awaitable[str]]

REFUSED = {"400", "413", "415", "422"}
KINDS: dict[Abuse, set[str]] = {
    Abuser.leaves_during_the_body: {"left"},
    Abuser.leaves_before_the_answer: {"left"},
    Abuser.leaves_midstream: {"left"},
    Abuser.leaves_a_pipeline: {"left"},
    Abuser.sends_a_pipeline: {"in order"},
    Abuser.truncates_json: {"400"},
    Abuser.names_another_type: {"415"},
    Abuser.is_not_utf8: {"400"},
    Abuser.nests_deeply: {"400"},
    Abuser.is_garbage: {"400"},
    Abuser.asks_for_nothing_there: {"404", "405"},
    Abuser.asks_for_an_upgrade: {"200"},
    Abuser.announces_too_little: {"400"},
    Abuser.announces_too_much: {"none"},
    Abuser.announces_nonsense: {"400"},
    Abuser.sends_too_much: {"413"},
    Abuser.sends_chunks_without_end: {"413"},
    Abuser.sends_headers_without_end: {"431", "none"},
    Abuser.trickles_its_body: {"200"},
}
"""The statuses that an abuse may end with."""


def body(path: str, num_tokens: int) -> bytes:
    if path.startswith("/v1"):
        content = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": num_tokens, "stream": True}
        return json.dumps(content).encode()
    parameters = {"max_new_tokens": num_tokens}
    return json.dumps({"inputs": "hello", "parameters": parameters, "stream": True}).encode()


def request(path: str, data: bytes, *, length: str | None = "", content_type: str = "application/json") -> bytes:
    """`length` is the length that the head states: "" for the true one, None for chunks."""
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length or len(data)}"
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\n{size}\r\n\r\n"
    return head.encode() + data


async def read_slowly(abuser: Abuser, is_over: asyncio.Event) -> None:
    """Read one byte per second of a stream of thousands of events, through the smallest buffer there is."""
    await abuser.open(receive_buffer=1)
    await abuser.send(abuser.whole(8000, is_stream=True))
    while not is_over.is_set():
        assert await abuser._reader.read(1)
        await asyncio.sleep(1)
    abuser.close()


async def abuse(port: int, num_requests: int) -> dict[str, dict[str, int]]:
    outcomes: dict[str, dict[str, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    is_over = asyncio.Event()
    slow = [asyncio.create_task(read_slowly(Abuser(port, random.Random(i)), is_over)) for i in range(NUM_SLOW_READERS)]
    waiting = iter(range(num_requests))

    async def client() -> None:
        for index in waiting:
            chance = random.Random(index)
            kind = chance.choice(list(KINDS))
            abuser = Abuser(port, chance)
            await abuser.open()
            try:
                outcome = await asyncio.wait_for(kind(abuser), TIMEOUT_S)
            except TimeoutError:
                outcome = "silence"
            abuser.close()
            outcomes[kind.__name__][outcome] += 1

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    is_over.set()
    await asyncio.gather(*slow)
    return outcomes


if __name__ == "__main__":
    os.nice(10)
    print(json.dumps(asyncio.run(abuse(int(sys.argv[1]), int(sys.argv[2])))))
