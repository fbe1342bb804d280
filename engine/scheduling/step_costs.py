"""How long a step takes by its number of rows, where every sequence computes a few tokens: measured, then kept true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

SMOOTHING = 0.01
"""Share of a new observation in a row count's seconds: slow beside the drift, which is to take up what is common."""
DRIFT_SMOOTHING = 0.2


class CostObserver(Protocol):
    """What is told how long steps take, by their rows."""

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`."""


class UnusedCosts:
    """Takes the place of StepCosts where nothing is decided by them."""

    def observe(self, rows: int, seconds: float) -> None:
        pass


class StepCosts:
    """Seconds by rows, interpolated between the counts that were measured and carried on beyond the largest.

    Kernels take rows in tiles, so that one more row may cost nothing or as much as several: what was interpolated gives
    way to what is seen. What changes for all counts alike (longer contexts, busier cores) is learnt as one factor, so
    that a count that is seen often is not taken for slower than the others only because it was seen last.
    """

    def __init__(self, seconds_by_rows: Mapping[int, float]) -> None:
        if len(seconds_by_rows) < 2:
            raise ValueError("costs must be known for two row counts at least")
        measured = sorted(seconds_by_rows)
        rows = np.arange(measured[-1] + 1)
        seconds = [seconds_by_rows[count] for count in measured]
        self._seconds: list[float] = np.interp(rows, measured, seconds).tolist()
        self._slope = (seconds[-1] - seconds[-2]) / (measured[-1] - measured[-2])
        self._shares = [SMOOTHING if count in seconds_by_rows else 0.5 for count in rows]
        """Of the next observation: what was interpolated counts as one observation."""
        # No count is dearer than a larger one.
        place = np.searchsorted(measured, rows)
        self._least = [seconds[max(0, index - 1)] for index in place]
        self._most = [seconds[index] for index in place]
        self._drift = 1.0

    def seconds(self, rows: int) -> float:
        """Relative to each other they hold at any time; absolutely, for contexts as long as when measured."""
        num_beyond = max(0, rows - len(self._seconds) + 1)
        return self._seconds[rows - num_beyond] + num_beyond * self._slope

    def observe(self, rows: int, seconds: float) -> None:
        relative = seconds / self.seconds(rows)
        self._drift += DRIFT_SMOOTHING * (min(relative, 4 * self._drift) - self._drift)
        if rows >= len(self._seconds):
            return
        share, known, expected = self._shares[rows], self._seconds[rows], seconds / self._drift
        if share > SMOOTHING:
            bounded = min(max(expected, self._least[rows]), self._most[rows])
        else:
            bounded = min(max(expected, 0.5 * known), 2 * known)  # a disturbed step
        self._seconds[rows] += share * (bounded - known)
        self._shares[rows] = max(SMOOTHING, share / (1 + share))
