"""The front: one port, behind which each request goes whole to the replica that it has leased.

It reads bodies only to know how prompts begin. Answers, errors and streams pass as the replica's server wrote them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from ray.exceptions import RayError
from yarl import URL

from engine.link.errors import GenerationError
from server.answers.broadcast import Broadcast
from server.answers.sse import EVENT_HEADERS
from server.errors import OverloadedError, UnhealthyError
from server.replicas.ends import GONE, end_of_stream, failed_answer
from server.replicas.figures import EVENTS_PATH, KEY_HEADERS, ReplicaFigures
from server.replicas.metrics import merge_metrics
from server.replicas.prompt_blocks import prompt_blocks

logger = logging.getLogger("front")

MAX_READ_BYTES = 1 << 20
"""A longer body passes as it comes, and is routed by load alone."""
READ_TIMEOUT_S = 1.0
"""A body that is not there by then likewise; the replica's server says how slow a client may be."""
LEASE_TIMEOUT_S = 300.0
"""The time of a request to wait while there is no replica, as during an update of a single one."""
PROBE_TIMEOUT_S = 5.0
METRICS_TIMEOUT_S = 10.0
UNREAD_TIMEOUT_S = 30.0
"""A dashboard that takes nothing for so long is given up."""
MAX_TRIES = 5
RETRY_PAUSE_S = 0.2
CONNECT_TIMEOUT_S = 5.0
IDLE_CONNECTION_S = 30.0
"""Shorter than the server's, so that it is never the server that closes an idle connection under a new request."""
EVENTS = "text/event-stream"
HOP_BY_HOP = frozenset("connection keep-alive proxy-connection te trailer transfer-encoding upgrade expect".split())
SESSION = web.AppKey("session", aiohttp.ClientSession)


class UnreachableError(Exception):
    """No byte of a request has reached its replica: another one may have it."""


class Front:
    """Passes requests on to the replicas behind `handle`, a handle of the Serve deployment."""

    def __init__(self, handle: Any, *, is_strict: bool) -> None:
        self._leases = handle.options(method_name="lease", stream=True)
        self._handle = handle
        self._is_strict = is_strict
        self._figures = ReplicaFigures(handle)
        self._dashboards = Broadcast(self._figures.lines)

    def app(self) -> web.Application:
        app = web.Application()
        app.cleanup_ctx.append(self._client)
        app.on_response_prepare.append(_shape_headers)
        app.on_shutdown.append(self._end_dashboards)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get(EVENTS_PATH, self.figures, allow_head=False)
        app.router.add_route("*", "/{path:.*}", self.forward)
        return app

    def runner(self, drain_s: float) -> web.AppRunner:
        """The front's server. When it is cleaned up, running requests may end within `drain_s`."""
        return web.AppRunner(
            self.app(), handler_cancellation=True, auto_decompress=False, access_log=None, shutdown_timeout=drain_s
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """The metrics of all replicas that give theirs. Serve calls each of them."""
        results = await self._handle.broadcast("metrics").results_async(
            timeout_s=METRICS_TIMEOUT_S, return_exceptions=True
        )
        texts = [result for result in results if not isinstance(result, BaseException)]  # one may just be ending
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(text=merge_metrics(sorted(texts)), headers=headers)

    async def figures(self, request: web.Request) -> web.StreamResponse:
        """The figures of all replicas, once a second, for whom a replica would give its own; else its refusal."""
        if not await self._may_watch(request):
            return await self.forward(request)
        self._figures.key = _key_of(request)
        try:
            reader = self._dashboards.join()
        except (OverloadedError, UnhealthyError) as error:
            return self._failed(request, error)
        response = web.StreamResponse(headers=EVENT_HEADERS | {"x-accel-buffering": "no"})
        try:
            await response.prepare(request)
            async for line in reader.events():
                async with asyncio.timeout(UNREAD_TIMEOUT_S):
                    await response.write(line)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._dashboards.leave(reader)
        return response

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """The answer of a replica, or ours if there is none."""
        start, is_whole = await _start_of_body(request)
        is_read = is_whole and "content-encoding" not in request.headers
        blocks = prompt_blocks(start) if is_read else []
        for _ in range(MAX_TRIES):
            try:
                timeout_s = LEASE_TIMEOUT_S if request.method == "POST" else PROBE_TIMEOUT_S
                async with self._lease(blocks, timeout_s) as address:
                    return await self._pass_on(request, address, start if is_whole else _rest(start, request.content))
            except UnreachableError:
                await asyncio.sleep(RETRY_PAUSE_S)
            except TimeoutError:
                break
        return self._failed(request, UnhealthyError())

    @contextlib.asynccontextmanager
    async def _lease(self, blocks: Sequence[bytes], timeout_s: float) -> AsyncIterator[str]:
        """The address of a replica, which counts this request until the block ends.

        Raises TimeoutError if there is none, UnreachableError if the one that was chosen died.
        """
        lease = self._leases.remote(blocks)
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    address = await anext(aiter(lease))
            except RayError as error:
                raise UnreachableError from error
            yield address
        finally:
            lease.cancel()

    async def _pass_on(
        self, request: web.Request, address: str, body: bytes | AsyncIterator[bytes]
    ) -> web.StreamResponse:
        session: aiohttp.ClientSession = request.app[SESSION]
        headers = _passing(request.raw_headers)
        # A proxy's client sends the whole URL.
        target = request.raw_path if request.raw_path.startswith("/") else request.rel_url.raw_path_qs
        url = URL(f"http://{address}{target}", encoded=True)
        try:
            upstream = await session.request(
                request.method, url, headers=headers, data=body or None, allow_redirects=False
            )
        except aiohttp.ClientConnectorError as error:
            raise UnreachableError from error
        except (aiohttp.ClientError, ConnectionError):
            return self._failed(request, GONE)
        async with upstream:
            return await self._copy(request, upstream)

    async def _copy(self, request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(
            status=upstream.status, reason=upstream.reason, headers=_passing(upstream.raw_headers)
        )
        await response.prepare(request)
        tail = b""
        while True:
            try:
                data = await upstream.content.readany()
            except (aiohttp.ClientError, ConnectionError):
                logger.error("A replica is gone: ending the answer to %s", request.path)
                await self._end(request, response, tail if upstream.content_type == EVENTS else None)
                return response
            if not data:
                await response.write_eof()
                return response
            await response.write(data)
            tail = data

    async def _end(self, request: web.Request, response: web.StreamResponse, tail: bytes | None) -> None:
        """End a stream whose replica is gone by an event. A plain answer (`tail` is None) can only be broken off."""
        if tail is not None:
            await response.write(end_of_stream(request.path, tail, is_strict=self._is_strict))
            await response.write_eof()
        elif request.transport is not None:
            request.transport.abort()

    def _failed(self, request: web.Request, error: GenerationError | OverloadedError | UnhealthyError) -> web.Response:
        status, body = failed_answer(request.path, error, is_strict=self._is_strict)
        return web.Response(status=status, body=body, headers={"content-type": "application/json"})

    async def _may_watch(self, request: web.Request) -> bool:
        session: aiohttp.ClientSession = request.app[SESSION]
        try:
            async with self._lease([], PROBE_TIMEOUT_S) as address:
                url = URL(f"http://{address}{EVENTS_PATH}")
                # Nothing else passes: the length of a body that is not sent would swallow the next request there.
                async with session.head(url, headers=_key_of(request)) as answer:
                    return bool(answer.status == 200)
        except (UnreachableError, TimeoutError, aiohttp.ClientError, ConnectionError):
            return False

    async def _end_dashboards(self, app: web.Application) -> None:
        self._dashboards.close()

    async def _client(self, app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        ) as app[SESSION]:
            yield


def _key_of(request: web.Request) -> dict[str, str]:
    """The headers that may carry the API key."""
    headers = _passing(request.raw_headers)
    return {name: headers[name] for name in KEY_HEADERS if name in headers}


async def _start_of_body(request: web.Request) -> tuple[bytes, bool]:
    """The part of the body that comes within the limits on size and time, and whether that is all."""
    parts, size = [], 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READ_TIMEOUT_S):
            while size <= MAX_READ_BYTES and (data := await request.content.readany()):
                parts.append(data)
                size += len(data)
    return b"".join(parts), request.content.at_eof() and size <= MAX_READ_BYTES


async def _rest(start: bytes, content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    yield start
    async for data in content.iter_any():
        yield data


def _passing(raw_headers: Iterable[tuple[bytes, bytes]]) -> CIMultiDict[str]:
    """The headers of a message that are not about its connection, spelled as they came."""
    headers = CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in raw_headers)
    named = {name.strip().lower() for name in ",".join(headers.getall("connection", [])).split(",")}
    for name in HOP_BY_HOP | named:
        headers.popall(name, None)
    return headers


async def _shape_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Take away what aiohttp adds and the replica's server does not send; all names in lower case, as there."""
    extra = {"server", *(["content-type"] if response.content_length == 0 else [])}
    headers = [(name.lower(), value) for name, value in response.headers.items() if name.lower() not in extra]
    response.headers.clear()
    response.headers.extend(headers)
