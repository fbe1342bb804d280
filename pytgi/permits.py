"""How many requests of an LLM may be under way: those of its batches wait for each other, whatever thread calls."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
from collections.abc import Callable, Iterator

POLL_S = 0.1


def max_connections() -> int:
    """Half of the descriptors that this process may have, of which each request needs one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft // 2)


class Permits:
    """`limit` permits. A stream never waits for one: its caller may hold it while it calls for something else."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_taken = 0
        self._num_waited_for = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def wait(self, count: int, is_over: Callable[[], bool]) -> Iterator[None]:
        """Wait for `count` permits, all of them where `limit` is less. Raises ConnectionError once `is_over()`.

        Where streams alone have the others the server decides: they may never end.
        """
        count = min(count, self._limit)
        with self._changed:
            while self._num_waited_for and self._num_taken + count > self._limit:
                self._changed.wait(POLL_S)
                if is_over():
                    raise ConnectionError("the requests were broken off")
            self._num_waited_for += count
            self._num_taken += count
        try:
            yield
        finally:
            with self._changed:
                self._num_waited_for -= count
                self._give_back(count)

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Take a permit, also where none is left: the server refuses the request then."""
        with self._changed:
            self._num_taken += 1
        try:
            yield
        finally:
            with self._changed:
                self._give_back(1)

    def _give_back(self, count: int) -> None:
        self._num_taken -= count
        self._changed.notify_all()
