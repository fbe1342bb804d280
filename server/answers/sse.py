"""Server-sent events as TGI frames them (`docs/wire.md`, 3.1): flushed one by one, kept alive while silent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Protocol

from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from server.answers.json import encoder
from server.telemetry.spans import log_failure

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"
EVENT_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache"}


class Typed(Protocol):
    """Data that say their type."""

    @property
    def type(self) -> str: ...


def event(data: object) -> bytes:
    return b"data: " + encoder.encode(data) + b"\n\n"


def named_event(data: Typed) -> bytes:
    """An event that says its type on a line of its own, too."""
    return b"event: " + data.type.encode() + b"\n" + event(data)


async def with_error_event(
    events: AsyncGenerator[bytes], error_event: Callable[[Exception], bytes]
) -> AsyncGenerator[bytes]:
    """`events`. If they fail, one more event says so, as the status line has left already."""
    async with contextlib.aclosing(events):
        try:
            async for item in events:
                yield item
        except Exception as error:
            log_failure(error)
            yield error_event(error)


class EventStream(EventSourceResponse):
    """A stream of encoded events.

    sse-starlette pings at a fixed interval; TGI's timer restarts with every event, hence the timer here. A client that
    takes nothing for `send_timeout_s` is given up: its permit and its KV memory go to somebody who reads. `close` is
    called at the end: a client may have left before the events begin, whose block would give the permit back.
    """

    keep_alive_s = 15.0
    send_timeout_s = 120.0

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str], close: Callable[[], None]) -> None:
        super().__init__(events, headers=headers | EVENT_HEADERS, ping=0, send_timeout=self.send_timeout_s)
        self._close = close
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()

        is_gone = False

        async def watched_receive() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone = message["type"] == "http.disconnect"
            return message

        async def timed_send(message: Message) -> None:
            # anyio cancels a task only while what it waits for is not there yet, which is never where a busy loop finds
            # the next token in each of its turns.
            if is_gone:
                raise ClientDisconnect
            await send(message)
            self._last_sent = loop.time()

        self._last_sent = loop.time()
        keep_alive = asyncio.create_task(self._keep_alive(timed_send))
        try:
            await super().__call__(scope, watched_receive, timed_send)
        except ClientDisconnect:
            pass
        except SendTimeoutError:
            logger.error("a client has not read its stream for %g s: giving it up", self.send_timeout_s)
        finally:
            keep_alive.cancel()
            self._close()

    async def _keep_alive(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._last_sent + self.keep_alive_s - loop.time())
            if loop.time() - self._last_sent >= self.keep_alive_s:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
