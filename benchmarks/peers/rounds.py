"""Rounds in which all sides take turns; one during which others use the processors is discarded and repeated."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import psutil

Name = TypeVar("Name", bound=Hashable)
PAUSE_S = 0.5
"""Before each turn: the threads of the side before go on looking for work a while, those of Intel's libiomp5 for 0.2 s,
as long as a short prompt takes."""
MAX_DISCARDED = 3
"""Rounds that may be discarded for each one that is wanted."""


class TooLoadedError(Exception):
    """The machine did not become quiet."""


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time of a process and all its children so far."""
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system
    return total


def busy_seconds() -> float:
    """Processor time that the whole machine has used, or that its host has taken away."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


class OtherLoad:
    """Processors that others than this process and its children use, on average since the start."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._before = self._now()

    def _now(self) -> tuple[float, float]:
        return time.monotonic(), busy_seconds() - cpu_seconds(self._own)

    def value(self) -> float:
        (then, others_then), (now, others) = self._before, self._now()
        return max(0.0, (others - others_then) / max(now - then, 0.01))


def quiet_rounds(play: Callable[[], Any], num_rounds: int, max_load: float) -> Iterator[Any]:
    """What `play` returns in each of `num_rounds` quiet rounds. Raises TooLoadedError."""
    discarded = 0
    while num_rounds:
        load = OtherLoad()
        result = play()
        others = load.value()
        if others <= max_load:
            num_rounds -= 1
            yield result
        elif (discarded := discarded + 1) > MAX_DISCARDED * num_rounds:
            raise TooLoadedError(f"others use {others:.1f} processors: {discarded} rounds were discarded")
        else:
            print(f"a round is discarded: others use {others:.1f} processors", file=sys.stderr)


def take_turns(
    sides: Mapping[Name, Callable[[], Any]], num_rounds: int, max_load: float
) -> tuple[dict[Name, list[Any]], dict[Name, str]]:
    """What each side returned, by round, and why those that failed did; a failure ends its side's turns only."""
    failures: dict[Name, str] = {}

    def play() -> dict[Name, Any]:
        answers: dict[Name, Any] = {}
        for name, turn in sides.items():
            if name not in failures:
                time.sleep(PAUSE_S)
                try:
                    answers[name] = turn()
                except (RuntimeError, OSError, ValueError) as error:
                    failures[name] = str(error)
        return answers

    rounds = list(quiet_rounds(play, num_rounds, max_load))
    names = [name for name in sides if name not in failures]
    return {name: [answers[name] for answers in rounds] for name in names}, failures
