"""All connections of a server: how many there may be, how long each may be silent, what their clients have not read.

Knows connections by what they do (`Connection`), not by how they do it.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 8192
"""However many descriptors there are: an idle connection costs memory, too."""
NUM_RESERVED = 64
"""Descriptors that are no connection's: files, the checker of grammars, refusals on their way out."""
STARTS_PER_TURN = 4
"""Requests that begin in one turn of the event loop."""
SWEEP_S = 1.0
"""How often all connections are looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """The limits of connections."""

    max_connections: int = MAX_CONNECTIONS
    idle_s: float = 75.0
    """The time of a connection between two requests, and before its first one."""
    head_s: float = 20.0
    """The time that a head may take, and what is left of a body that is refused."""
    unread_s: float = 30.0
    """The time in which a client must read something of a whole answer, and the time that every answer may take."""
    stream_unread_s: float = 150.0
    """The same for an answer that is not complete; streams of events wait less by themselves."""
    stalled_s: float = 5.0
    """The time after which a client that reads nothing of a running answer gives way to a new connection."""
    min_bytes_per_s: int = 8_000
    """The time for a large answer is one second more for so many bytes that have been read."""
    max_unread_bytes: int = 48_000_000
    """Bytes of all whole answers that wait for their clients."""


class TrackedConnection(Protocol):
    """What the table asks of a connection."""

    @property
    def num_unread_bytes(self) -> int:
        """Bytes that wait to be written."""
        ...

    def close_quietly(self) -> None:
        """End between two requests."""

    def refuse_head(self) -> None:
        """End because the head takes too long."""

    def abort(self) -> None:
        """End at once, whatever waits to be written."""


class Progress:
    """What the table knows of one connection; times are the loop's."""

    __slots__ = (
        "head_since",
        "is_running",
        "max_unread",
        "num_unread",
        "unread_since",
        "unread_start",
        "waiting_since",
    )

    def __init__(self, now: float) -> None:
        self.waiting_since = now
        """The time since which no request is complete."""
        self.head_since: float | None = None
        """The time of the first byte since then."""
        self.is_running = False
        self.num_unread = 0
        self.max_unread = 0
        self.unread_start = now
        """The time since which something waits to be written."""
        self.unread_since = now
        """The time since which the client has read nothing."""


class ConnectionTable:
    """The connections of one server. All calls come from its event loop."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._all: dict[TrackedConnection, Progress] = {}
        self._waiting: OrderedDict[TrackedConnection, None] = OrderedDict()
        """Connections without a request, those first that have been so for longest."""
        self._arriving: OrderedDict[TrackedConnection, None] = OrderedDict()
        """Connections whose request's body is on its way, the first one first."""
        self._stalled: OrderedDict[TrackedConnection, None] = OrderedDict()
        """Connections whose client reads nothing of a running answer, as the last sweep has seen, the longest first."""
        self._owing: set[TrackedConnection] = set()
        """Connections whose client has not read a whole answer."""
        self._timer: asyncio.TimerHandle | None = None
        self._starts: deque[Callable[[], None]] = deque()
        self.num_refused = 0
        """Connections beyond the limit, which are open until they have been told so."""

    def admit(self, connection: TrackedConnection) -> bool:
        """Take a new connection in, if need be in place of another one that waits."""
        while len(self._all) >= self.limits.max_connections:
            waiting = self._waiting or self._arriving or self._stalled
            if not waiting:
                return False
            oldest = next(iter(waiting))
            self.remove(oldest)
            if oldest.num_unread_bytes:
                oldest.abort()
            else:
                oldest.close_quietly()
        self._all[connection] = Progress(self._now())
        self._waiting[connection] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        return True

    def start(self, begin: Callable[[], None]) -> None:
        """Call `begin`, which starts a request, in this turn of the loop or in one of the next.

        If all requests that come at once had the same turn, a stream's next token would wait for all of them.
        """
        self._starts.append(begin)
        if len(self._starts) == 1:
            asyncio.get_running_loop().call_soon(self._start_some)

    def _start_some(self) -> None:
        for _ in range(min(STARTS_PER_TURN, len(self._starts))):
            self._starts.popleft()()
        if self._starts:
            asyncio.get_running_loop().call_soon(self._start_some)

    def remove(self, connection: TrackedConnection) -> None:
        self._all.pop(connection, None)
        self._waiting.pop(connection, None)
        self._arriving.pop(connection, None)
        self._stalled.pop(connection, None)
        self._owing.discard(connection)

    def head_began(self, connection: TrackedConnection) -> None:
        """Bytes have come."""
        progress = self._all.get(connection)
        if progress is not None and progress.head_since is None:
            progress.head_since = self._now()

    def request_began(self, connection: TrackedConnection) -> None:
        """A head is complete."""
        self._waiting.pop(connection, None)
        progress = self._all.get(connection)
        if progress is not None and not progress.is_running:
            progress.is_running = True
            self._arriving[connection] = None

    def body_ended(self, connection: TrackedConnection) -> None:
        """A request is complete."""
        self._arriving.pop(connection, None)

    def answer_ended(self, connection: TrackedConnection) -> None:
        """The whole answer was handed over for writing, and no other request is there."""
        self._arriving.pop(connection, None)
        progress = self._all.get(connection)
        if progress is None:
            return
        progress.is_running = False
        progress.head_since = None
        progress.waiting_since = self._now()
        self._waiting[connection] = None
        if connection.num_unread_bytes:
            self._owing.add(connection)
            self._note_reading(connection, progress, progress.waiting_since)
            self._bound_unread()

    def _bound_unread(self) -> None:
        """Give clients up, those first that read slowest, until what waits for the others is little enough."""
        while len(self._owing) > 1 and self._num_owed() > self.limits.max_unread_bytes:
            self._give_up(min(self._owing, key=lambda owing: self._reading_rate(self._all[owing])))

    def _num_owed(self) -> int:
        return sum(connection.num_unread_bytes for connection in self._owing)

    def _reading_rate(self, progress: Progress) -> float:
        """Bytes per second; a client that has just been answered counts as fast."""
        elapsed = self._now() - progress.unread_start
        return (progress.max_unread - progress.num_unread + (1 << 20)) / (elapsed + 0.1)

    def _give_up(self, connection: TrackedConnection) -> None:
        logger.error("a client has not read its answer in time: giving it up")
        self.remove(connection)
        connection.abort()

    def _sweep(self) -> None:
        """End what has taken too long."""
        now = self._now()
        for connection, progress in list(self._all.items()):
            self._note_reading(connection, progress, now)
            if self._is_unread_too_long(progress, now):
                self._give_up(connection)
            elif not progress.is_running and not progress.num_unread:
                self._owing.discard(connection)
                self._end_if_silent(connection, progress, now)
        self._stalled = self._stalled_until(now)
        self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep) if self._all else None

    def _stalled_until(self, now: float) -> OrderedDict[TrackedConnection, None]:
        stalled = [
            (progress.unread_since, connection)
            for connection, progress in self._all.items()
            if progress.is_running and progress.num_unread and now - progress.unread_since > self.limits.stalled_s
        ]
        return OrderedDict.fromkeys(connection for _, connection in sorted(stalled, key=lambda pair: pair[0]))

    def _note_reading(self, connection: TrackedConnection, progress: Progress, now: float) -> None:
        unread = connection.num_unread_bytes
        if unread and not progress.num_unread:
            progress.unread_start = progress.unread_since = now
            progress.max_unread = unread
        elif unread != progress.num_unread:
            progress.unread_since = now
            progress.max_unread = max(progress.max_unread, unread)
        progress.num_unread = unread

    def _is_unread_too_long(self, progress: Progress, now: float) -> bool:
        limits = self.limits
        if not progress.num_unread:
            return False
        if progress.is_running:
            return now - progress.unread_since > limits.stream_unread_s
        num_read = progress.max_unread - progress.num_unread
        allowed = limits.unread_s + num_read / limits.min_bytes_per_s
        return now - progress.unread_since > limits.unread_s or now - progress.unread_start > allowed

    def _end_if_silent(self, connection: TrackedConnection, progress: Progress, now: float) -> None:
        if progress.head_since is not None:
            if now - progress.head_since > self.limits.head_s:
                connection.refuse_head()
        elif now - progress.waiting_since > self.limits.idle_s:
            connection.close_quietly()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def raise_descriptor_limit() -> int:
    """Let this process open as many descriptors as it may, and say how many connections that leaves room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    if hard == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, hard - num_open - NUM_RESERVED))
