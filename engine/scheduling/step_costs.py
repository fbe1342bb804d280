"""Seconds of a step by its number of rows, where every sequence computes a few tokens: measured, then kept true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

SMOOTHING = 0.01
"""Weight of a new observation in a row count's seconds: slow beside the drift, which takes up what all counts share."""
DRIFT_SMOOTHING = 0.2


class CostObserver(Protocol):
    """Learns how long steps take, by their rows."""

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`."""


class UnusedCosts:
    """Stands for StepCosts where nothing is decided by them; it learns nothing."""

    def observe(self, rows: int, seconds: float) -> None:
        pass


class StepCosts:
    """Seconds by rows, interpolated between the counts that were measured and extrapolated beyond the largest.

    Kernels take rows in tiles, so that one more row may cost nothing or as much as several: an observation soon
    replaces an interpolated number. Longer contexts and busier cores change all counts alike: that is learnt as one
    factor, so that a count that is seen often does not look slower than the others only because it was seen last.
    """

    def __init__(self, seconds_by_rows: Mapping[int, float]) -> None:
        if len(seconds_by_rows) < 2:
            raise ValueError("costs must be known for two row counts at least")
        measured = sorted(seconds_by_rows)
        rows = np.arange(measured[-1] + 1)
        seconds = [seconds_by_rows[count] for count in measured]
        self._seconds: list[float] = np.interp(rows, measured, seconds).tolist()
        self._slope = (seconds[-1] - seconds[-2]) / (measured[-1] - measured[-2])
        self._weights = [SMOOTHING if count in seconds_by_rows else 0.5 for count in rows]
        """Weight of the next observation at each count: an interpolated number counts as one observation."""
        # No count costs more than a larger one.
        place = np.searchsorted(measured, rows)
        self._min_seconds = [seconds[max(0, index - 1)] for index in place]
        self._max_seconds = [seconds[index] for index in place]
        self._drift = 1.0

    def seconds(self, rows: int) -> float:
        """Predicted seconds of a step of `rows` rows, without the drift.

        Ratios between row counts always hold. Absolute seconds hold for contexts as long as those measured.
        """
        num_beyond = max(0, rows - len(self._seconds) + 1)
        return self._seconds[rows - num_beyond] + num_beyond * self._slope

    def observe(self, rows: int, seconds: float) -> None:
        relative = seconds / self.seconds(rows)
        self._drift += DRIFT_SMOOTHING * (min(relative, 4 * self._drift) - self._drift)
        if rows >= len(self._seconds):
            return
        weight, known, expected = self._weights[rows], self._seconds[rows], seconds / self._drift
        if weight > SMOOTHING:
            bounded = min(max(expected, self._min_seconds[rows]), self._max_seconds[rows])
        else:
            bounded = min(max(expected, 0.5 * known), 2 * known)  # a disturbed step
        self._seconds[rows] += weight * (bounded - known)
        self._weights[rows] = max(SMOOTHING, weight / (1 + weight))
