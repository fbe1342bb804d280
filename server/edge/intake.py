"""Bodies on their way in: how large each may be, how slowly it may come, how much memory all may hold together."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.edge.encoding import reader_of
from server.errors import BodyError, OverloadedError

TOO_LONG = "Failed to buffer the request body: length limit exceeded"
MAX_LENGTH_DIGITS = 20
"""Digits of a length that is a number at all; Python would refuse to read more than 4,300."""
SCOPE_KEY = "pytgi.arrival"


def _too_long(limit: int) -> BodyError:
    return BodyError(413, TOO_LONG, hint=f". A body may have {limit} bytes; `--payload-limit` raises that")


@dataclass(frozen=True, kw_only=True, slots=True)
class IntakeLimits:
    """The limits of bodies."""

    max_body_bytes: int
    max_total_bytes: int
    """Memory of the bodies of all requests, from their first byte until the requests have ended."""
    silence_s: float = 10.0
    """The longest pause within a body."""
    grace_s: float = 10.0
    """The time that every body may take."""
    min_bytes_per_s: int = 8_000
    """The time beyond that is one second for so many bytes that have come."""
    patience_s: float = 1.0
    """When memory is short, a body that paused for longer is given up for one that comes."""

    @classmethod
    def for_bodies_of(cls, max_body_bytes: int) -> IntakeLimits:
        """The limits of a server whose largest bodies, eight of them at least, find memory at a time."""
        return cls(max_body_bytes=max_body_bytes, max_total_bytes=max(60_000_000, 8 * max_body_bytes))


class Arrival:
    """One request's body and the memory that is held for it."""

    def __init__(self, timer: asyncio.Timeout) -> None:
        self.timer = timer
        self.num_bytes = 0
        self.last_progress = 0.0
        self.is_complete = False


class Intake:
    """The bodies of one server."""

    def __init__(self, limits: IntakeLimits, *, is_strict: bool = False) -> None:
        """`is_strict`: bodies are taken as they come, as by TGI, whatever their encoding."""
        self._limits = limits
        self._is_strict = is_strict
        self._arrivals: set[Arrival] = set()
        self.num_bytes = 0
        """Memory that is held for bodies."""

    async def receive(self, request: Request) -> bytes:
        """The whole body, whose memory is held until the request ends. Raises BodyError, OverloadedError.

        It is refused as soon as it is known to be too long, whatever its headers say, compressed or not.
        """
        announced = request.headers.get("content-length", "")
        limit = self._limits.max_body_bytes
        is_number = announced.isdecimal() and announced.isascii()
        if is_number and (len(announced) > MAX_LENGTH_DIGITS or int(announced) > limit):
            raise _too_long(limit)
        reader = reader_of("" if self._is_strict else request.headers.get("content-encoding", ""))
        loop = asyncio.get_running_loop()
        started = loop.time()
        body = bytearray()
        num_received = 0
        try:
            async with asyncio.timeout_at(started + self._limits.silence_s) as timer:
                arrival = request.scope[SCOPE_KEY] = Arrival(timer)
                self._arrivals.add(arrival)
                async for chunk in request.stream():
                    num_received += len(chunk)
                    for piece in reader.push(chunk):
                        if max(len(body) + len(piece), num_received) > limit:
                            raise _too_long(limit)
                        body += piece
                        self._hold(arrival, len(piece))
                    arrival.last_progress = loop.time()
                    timer.reschedule(self._deadline(started, arrival))
        except TimeoutError:
            raise BodyError(408, "Failed to buffer the request body: it comes too slowly") from None
        reader.finish()
        arrival.is_complete = True
        return bytes(body)

    def hold(self, request: Request, num_bytes: int) -> None:
        """Hold memory for what a body becomes, beside its bytes. Raises OverloadedError."""
        self._hold(request.scope[SCOPE_KEY], num_bytes)

    def release(self, scope: Scope) -> None:
        """Give back what is held for the request of `scope`."""
        arrival = scope.pop(SCOPE_KEY, None)
        if arrival is not None:
            self._arrivals.discard(arrival)
            self.num_bytes -= arrival.num_bytes

    def _deadline(self, started: float, arrival: Arrival) -> float:
        limits = self._limits
        by_rate = started + limits.grace_s + arrival.num_bytes / limits.min_bytes_per_s
        return min(arrival.last_progress + limits.silence_s, by_rate)

    def _hold(self, arrival: Arrival, num_bytes: int) -> None:
        while self.num_bytes + num_bytes > self._limits.max_total_bytes:
            self._give_up_slowest(arrival)
        self.num_bytes += num_bytes
        arrival.num_bytes += num_bytes

    def _give_up_slowest(self, arrival: Arrival) -> None:
        """Make room by ending the body that has paused for longest. Raises OverloadedError if all of them come."""
        now = asyncio.get_running_loop().time()
        paused = [
            other
            for other in self._arrivals
            if other is not arrival
            and not other.is_complete
            and other.num_bytes
            and now - other.last_progress > self._limits.patience_s
        ]
        if not paused:
            raise OverloadedError
        slowest = min(paused, key=lambda other: other.last_progress)
        self.num_bytes -= slowest.num_bytes
        slowest.num_bytes = 0
        with contextlib.suppress(RuntimeError):  # its time is over already
            slowest.timer.reschedule(now)


class IntakeRelease:
    """The middleware that gives back the memory of a body when its request has ended."""

    def __init__(self, app: ASGIApp, intake: Intake) -> None:
        self._app = app
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            self._intake.release(scope)
