"""The requests that each replica has from this front, from the moment one is chosen for it.

Requests that come together are all routed before the first of them is sent. Counted only when they are sent, they would
all find the same replica lighter. The ids are Ray Serve's; this module knows neither Ray nor HTTP.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection

CHOICE_S = 5.0
"""A request that is not sent by then was given up: nobody says so of one that is cancelled before."""


class OpenRequests:
    """Counts requests by replica. One owner calls it; it is not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas: dict[str, str] = {}
        self._deadlines: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def choose(self, request: str, replica: str) -> None:
        """`request` is to go to `replica`."""
        self.send(request, replica)
        self._deadlines[request] = self._clock() + CHOICE_S

    def send(self, request: str, replica: str) -> None:
        """`replica` has `request`, whichever was chosen for it."""
        self.complete(request)
        self._replicas[request] = replica
        self._counts[replica] += 1

    def complete(self, request: str) -> None:
        """`request` has ended. One that no replica was chosen for, such as a call to all of them, does not count."""
        self._deadlines.pop(request, None)
        if (replica := self._replicas.pop(request, None)) is not None:
            self._counts[replica] -= 1

    def keep(self, replicas: Collection[str]) -> None:
        """Forget the requests of every replica that is not one of these."""
        for request in [request for request, replica in self._replicas.items() if replica not in replicas]:
            self.complete(request)
        for replica in [replica for replica in self._counts if replica not in replicas]:
            del self._counts[replica]

    def count(self, replica: str) -> int:
        """The requests that `replica` has or is about to get."""
        now = self._clock()
        while self._deadlines and now > self._deadlines[request := next(iter(self._deadlines))]:
            self.complete(request)
        return self._counts[replica]
