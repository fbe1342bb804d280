"""A limit to the time that a file's regular expressions may take. It loads no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

MAX_MATCHING_S = 5.0
"""Processor seconds that all names may be compared with a file's patterns. Hundreds of each take less than one."""
MAX_WAITING_S = 15.0
"""Seconds of the clock in which they may be: an engine that says nothing for 20 s counts as hung, and on a shared core
5 s of the processor may take longer."""
TIMERS = {signal.ITIMER_VIRTUAL: signal.SIGVTALRM, signal.ITIMER_REAL: signal.SIGALRM}


class MatchingTime:
    """The time that is left to the patterns of one file. It runs within `with` blocks, which it ends with an error.

    An expression can take longer than anybody lives for a name of forty characters. `re` looks for signals while it
    compares, so a timer ends it: in the main thread, where Python handles signals, and where models and adapters are
    read. One timer counts processor time, the other one the clock.
    """

    def __init__(self, refusal: Callable[[str], Exception]) -> None:
        """`refusal` makes the error of a reason."""
        self._refusal = refusal
        self._left_s = {signal.ITIMER_VIRTUAL: MAX_MATCHING_S, signal.ITIMER_REAL: MAX_WAITING_S}
        self._is_timed = False
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        self._is_timed = threading.current_thread() is threading.main_thread()
        if self._is_timed:
            for timer, number in TIMERS.items():
                self._handlers_before[number] = signal.signal(number, self._refuse)
                signal.setitimer(timer, self._left_s[timer])

    def __exit__(self, *error: object) -> None:
        if self._is_timed:
            for timer, number in TIMERS.items():
                left_s, _ = signal.setitimer(timer, 0)
                self._left_s[timer] = max(left_s, 1e-3)  # a timer of 0 never ends
                signal.signal(number, self._handlers_before[number])

    def _refuse(self, number: int, frame: FrameType | None) -> NoReturn:
        limit_s = MAX_WAITING_S if number == signal.SIGALRM else MAX_MATCHING_S
        raise self._refusal(f"to compare its patterns with the names of modules takes more than {limit_s:g} s")
