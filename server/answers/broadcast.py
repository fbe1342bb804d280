"""One sequence of events for many readers. It is made once for all, and only while there is a reader."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

from server.errors import OverloadedError, UnhealthyError

logger = logging.getLogger(__name__)

MAX_READERS = 64
MAX_WAITING = 8
"""Events that may wait for a reader, beside what its connection takes. One that reads so slowly is dropped."""


class Reader:
    """One reader's place: the events that have come and were not taken, and whether more will come."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()

    @property
    def num_waiting(self) -> int:
        return self._waiting.qsize()

    def put(self, event: bytes) -> None:
        self._waiting.put_nowait(event)

    def end(self) -> None:
        """Let no event come any more, not even those that wait."""
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)

    async def events(self) -> AsyncGenerator[bytes]:
        while (event := await self._waiting.get()) is not None:
            yield event


class Broadcast:
    """Gives every reader the same events, the very bytes."""

    def __init__(self, make_events: Callable[[], AsyncGenerator[bytes]]) -> None:
        """`make_events` is called when the first reader comes. What it gave is closed when the last one has left."""
        self._make_events = make_events
        self._readers: set[Reader] = set()
        self._sharing: asyncio.Task[None] | None = None
        self._is_closed = False

    def join(self) -> Reader:
        """A new reader's place; it gets the next event first.

        Raises OverloadedError if there are as many readers as there may be, UnhealthyError after `close`.
        """
        if self._is_closed:
            raise UnhealthyError
        if len(self._readers) >= MAX_READERS:
            raise OverloadedError(f"There are {MAX_READERS} readers already")
        reader = Reader()
        self._readers.add(reader)
        if self._sharing is None:
            self._sharing = asyncio.create_task(self._share())
        return reader

    def leave(self, reader: Reader) -> None:
        """End a reader's events; once more does nothing."""
        if reader not in self._readers:
            return
        self._readers.remove(reader)
        reader.end()
        if not self._readers and self._sharing is not None:
            self._sharing.cancel()
            self._sharing = None

    def close(self) -> None:
        """End the events of all readers, and let nobody join any more."""
        self._is_closed = True
        self._leave_all()

    def _leave_all(self) -> None:
        for reader in tuple(self._readers):
            self.leave(reader)

    async def _share(self) -> None:
        try:
            async with contextlib.aclosing(self._make_events()) as events:
                async for event in events:
                    self._hand_out(event)
        except Exception:
            logger.exception("Events that are shared can't be made")
        self._leave_all()  # not when cancelled: by then there may be readers of other events

    def _hand_out(self, event: bytes) -> None:
        for reader in tuple(self._readers):
            if reader.num_waiting < MAX_WAITING:
                reader.put(event)
            else:
                logger.info("A reader has left %d events unread: dropping it", MAX_WAITING)
                self.leave(reader)
