"""A server's address, and one request on a connection of its own: bytes out, reads with their moments in."""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import os
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from server.bench.answers import Read

LAST_CHUNK = b"\r\n0\r\n\r\n"
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Address:
    """An http or https URL; routes are below its path, of which they have a last `/v1` themselves."""

    url: str
    host: str
    port: int
    path: str
    is_tls: bool
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Address:
        """Raises ValueError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no http:// or https:// address")
        try:
            parts.hostname.encode("idna")
        except UnicodeError:
            raise ValueError(f"{url} has a host's name that no host can have") from None
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(url, parts.hostname, parts.port or (443 if is_tls else 80), path, is_tls, api_key)

    def request(self, route: str, body: Any = None) -> bytes:
        """A whole request, after whose answer the server closes the connection."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{'GET' if body is None else 'POST'} {self.path}{route} HTTP/1.1",
            f"Host: {f'[{self.host}]' if ':' in self.host else self.host}:{self.port}",
            "Connection: close",
            f"Content-Length: {len(data)}",
            *([] if body is None else ["Content-Type: application/json"]),
            *([f"Authorization: Bearer {self.api_key}"] if self.api_key else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + data


class _Reader(asyncio.Protocol):
    """Keeps every read and its moment."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.ended = asyncio.Event()
        self.last = 0.0
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        self.last = time.perf_counter()
        self.reads.append((self.last, data))
        self._tail = (self._tail + data[-len(LAST_CHUNK) :])[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK:  # not every proxy closes
            self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


@dataclass(frozen=True)
class Exchange:
    """A request's moment and all that came of it."""

    sent_at: float
    reads: list[Read]
    failure: str | None = None


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Read once: the certificates take milliseconds, while other requests are timed."""
    return ssl.create_default_context()


def _reason(error: OSError) -> str:
    """asyncio's own words name every address that it tried."""
    is_refused = f"[Errno {errno.ECONNREFUSED}]" in str(error)
    return os.strerror(errno.ECONNREFUSED) if is_refused else error.strerror or str(error)


async def exchange(address: Address, request: bytes, timeout_s: float) -> Exchange:
    """Send and read to the end. Times begin when the request is written, on an open connection.

    `timeout_s` is the longest time without a byte. A failure is in the result; nothing is raised.
    """
    loop = asyncio.get_running_loop()
    sent_at = time.perf_counter()
    try:
        tls = tls_context() if address.is_tls else None
        connecting = loop.create_connection(_Reader, address.host, address.port, ssl=tls)
        transport, reader = await asyncio.wait_for(connecting, min(timeout_s, CONNECT_TIMEOUT_S))
    except TimeoutError:
        return Exchange(sent_at, [], f"{address.url} takes no connection")
    except OSError as error:
        return Exchange(sent_at, [], f"{address.url} can't be reached: {_reason(error)}")
    try:
        sent_at = reader.last = time.perf_counter()
        transport.write(request)
        while not reader.ended.is_set():
            left_s = reader.last + timeout_s - time.perf_counter()
            if left_s <= 0:
                return Exchange(sent_at, reader.reads, f"no byte came for {timeout_s:g} s")
            try:
                await asyncio.wait_for(reader.ended.wait(), left_s)
            except TimeoutError:
                continue
        return Exchange(sent_at, reader.reads)
    finally:
        transport.abort()
