"""A limit to the time that a file's regular expressions may take. It loads no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

MAX_MATCHING_S = 5.0
"""Processor seconds that all names may be compared with a file's patterns. Hundreds of each take less than one."""


class MatchingTime:
    """The time that is left to the patterns of one file. It runs within `with` blocks, which it ends with an error.

    An expression can take longer than anybody lives for a name of forty characters. `re` looks for signals while it
    compares, so a timer ends it: in the main thread, where Python handles signals, and where models and adapters are
    read. The timer counts this process's own work, and not how long the machine lets it wait.
    """

    def __init__(self, refusal: Callable[[str], Exception]) -> None:
        """`refusal` makes the error of a reason."""
        self._refusal = refusal
        self._left_s = MAX_MATCHING_S
        self._is_timed = False
        self._handler_before: Any = None

    def __enter__(self) -> None:
        self._is_timed = threading.current_thread() is threading.main_thread()
        if self._is_timed:
            self._handler_before = signal.signal(signal.SIGVTALRM, self._refuse)
            signal.setitimer(signal.ITIMER_VIRTUAL, self._left_s)

    def __exit__(self, *error: object) -> None:
        if self._is_timed:
            left_s, _ = signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self._left_s = max(left_s, 1e-3)  # a timer of 0 never ends
            signal.signal(signal.SIGVTALRM, self._handler_before)

    def _refuse(self, number: int, frame: FrameType | None) -> NoReturn:
        raise self._refusal(f"to compare its patterns with the names of modules takes more than {MAX_MATCHING_S:g} s")
