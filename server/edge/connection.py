"""One client's TCP connection: uvicorn's, and a defence against clients that send too much or leave."""

from __future__ import annotations

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024
"""The limit of a request line and its headers, beside what comes with the first of them. uvicorn's other parser takes
as much."""
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Connection(HttpToolsProtocol):
    """Refuses a head that does not end, and tells the running request when its client leaves.

    uvicorn tells only the request that came last. If several came at once (HTTP pipelining), the request that runs
    would go on for nobody.
    """

    _running: RequestResponseCycle | None = None
    _num_unused_bytes = 0
    """Bytes since a head began or ended, or a piece of a body came: the parser must keep them."""

    def data_received(self, data: bytes) -> None:
        self._num_unused_bytes += len(data)
        super().data_received(data)
        if self._num_unused_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self._running is None or self._running.response_complete:  # else the 431 would be within another answer
                self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._num_unused_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._num_unused_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_unused_bytes = 0
        super().on_body(body)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # after a reset uvicorn lets the timer run on, which holds this connection
