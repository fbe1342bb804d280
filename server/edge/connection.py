"""One client's TCP connection: uvicorn's, and a defence against clients that send too much, too slowly, or leave."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.edge.connections import ConnectionTable
from server.edge.framing import framed

MAX_HEAD_BYTES = 64 * 1024
"""The limit of a request line and its headers, beside what comes with the first of them. uvicorn's other parser takes
as much."""
MAX_AHEAD_BYTES = 512 * 1024
"""The limit of what a client may send while its request runs."""
MAX_REFUSED = 32
REFUSED_S = 1.0
"""The time in which a client beyond the limit of connections may send its request, to be told why it is refused."""
FEED_S = 0.005
"""The time for which one client's bytes are parsed before others have their turn."""
PIECE_BYTES = 8 * 1024
"""Bytes that are parsed at a time: they hold a few hundred requests at most."""


def _refusal(status: str, text: str = "") -> bytes:
    type_ = "content-type: text/plain; charset=utf-8\r\n" if text else ""
    return f"HTTP/1.1 {status}\r\n{type_}content-length: {len(text)}\r\nconnection: close\r\n\r\n{text}".encode()


TOO_LARGE = _refusal("431 Request Header Fields Too Large")
TOO_SLOW = _refusal("408 Request Timeout")
TOO_MANY = _refusal("503 Service Unavailable", "Too many connections")


class Flow(FlowControl):
    """uvicorn's, whose reading can be held: a request that waits for its body does not go on with it."""

    _is_held = False

    def hold_reading(self, is_held: bool) -> None:
        """Read nothing while the reading is held."""
        if is_held:
            self.pause_reading()
        was_held, self._is_held = self._is_held, is_held
        if was_held and not is_held:
            self.resume_reading()

    def resume_reading(self) -> None:
        if not self._is_held:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """Refuses a head that does not end, and tells the running request when its client leaves.

    uvicorn tells only the request that came last. If several came at once (HTTP pipelining), the request that runs
    would go on for nobody. uvicorn also parses whatever has come; here what comes while a request waits for another one
    stays as it is.
    """

    _running: RequestResponseCycle | None = None
    _num_unused_bytes = 0
    """Bytes since a head began or ended, or a piece of a body came: the parser must keep them."""
    _is_feeding = False
    _is_refused = False
    """There are too many connections: what comes is not read, but for the refusal not to be lost to a reset."""

    def __init__(self, table: ConnectionTable, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table
        self._ahead = bytearray()
        """Bytes that were not parsed yet."""

    @classmethod
    def listed_in(cls, table: ConnectionTable) -> Any:
        """The protocol class, as uvicorn takes it, of connections in `table`."""
        return functools.partial(cls, table)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow: Flow = Flow(transport)
        if not self._table.admit(self):
            self._is_refused = True
            self._table.num_refused += 1
            self.loop.call_later(0 if self._table.num_refused > MAX_REFUSED else REFUSED_S, transport.close)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._is_refused:
            self._refuse(TOO_MANY)
            return
        self._table.head_began(self)
        self._ahead += data
        self._feed()
        if len(self._ahead) > MAX_AHEAD_BYTES:
            self.transport.close()

    def _feed(self) -> None:
        """Parse what has come, until a request waits for the running one.

        If that takes long the rest comes in the loop's next turns, and nothing more is read before.
        """
        if self._is_feeding:
            return
        self._is_feeding = True
        try:
            deadline = self.loop.time() + FEED_S
            is_late = False
            while self._ahead and not self.pipeline and not self.transport.is_closing() and not is_late:
                piece = bytes(self._ahead[:PIECE_BYTES])
                del self._ahead[:PIECE_BYTES]
                self._parse(piece)
                is_late = self.loop.time() > deadline
            if not self.transport.is_closing():
                self.flow.hold_reading(is_late)
            if is_late:
                self.loop.call_soon(self._feed)
        finally:
            self._is_feeding = False

    def _parse(self, data: bytes) -> None:
        self._num_unused_bytes += len(data)
        super().data_received(data)
        if self._num_unused_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(TOO_LARGE)

    def _refuse(self, answer: bytes) -> None:
        if self._running is None or self._running.response_complete:  # else it would be within another answer
            self.transport.write(answer)
        self.transport.close()

    def on_message_begin(self) -> None:
        self._num_unused_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._num_unused_bytes = 0
        self._table.request_began(self)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_unused_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._table.body_ended(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline and (self._running is None or self._running.response_complete):
            self._table.answer_ended(self)
        if self._ahead:
            self.loop.call_soon(self._feed)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        self._table.start(functools.partial(self._start_if_there, cycle, app))

    def _start_if_there(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if not cycle.disconnected and not self.transport.is_closing():
            super()._start_asgi_task(cycle, framed(app, cycle))

    def connection_lost(self, exc: Exception | None) -> None:
        self._table.remove(self)
        self._table.num_refused -= self._is_refused
        self._ahead.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # after a reset uvicorn lets the timer run on, which holds this connection

    @property
    def num_unread_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    def close_quietly(self) -> None:
        self.transport.close()

    def refuse_head(self) -> None:
        is_head = self.cycle is None or not self.cycle.more_body  # else it is a body that was refused
        self._refuse(TOO_SLOW if is_head else b"")

    def abort(self) -> None:
        self.transport.abort()
