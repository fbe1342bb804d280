"""How long a step takes by its number of rows, where every sequence computes a few tokens: measured, then kept true."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

SMOOTHING = 0.01
"""Share of a new observation in a row count's seconds: slow beside the drift, which is to take up what is common."""
DRIFT_SMOOTHING = 0.2


class StepCosts:
    """Seconds by rows, interpolated between the counts that were measured and carried on beyond the largest.

    What changes for all counts alike (longer contexts, busier cores) is learnt as one factor, so that a count that is
    seen often is not taken for slower than the others only because it was seen last.
    """

    def __init__(self, seconds_by_rows: Mapping[int, float]) -> None:
        if len(seconds_by_rows) < 2:
            raise ValueError("costs must be known for two row counts at least")
        self._rows = sorted(seconds_by_rows)
        self._seconds = [seconds_by_rows[rows] for rows in self._rows]
        self._drift = 1.0

    def seconds(self, rows: int) -> float:
        """Relative to each other they hold at any time; absolutely, for contexts as long as when measured."""
        upper = min(max(bisect.bisect_left(self._rows, rows), 1), len(self._rows) - 1)
        low, high = self._rows[upper - 1], self._rows[upper]
        share = (rows - low) / (high - low)
        return self._seconds[upper - 1] + share * (self._seconds[upper] - self._seconds[upper - 1])

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows that took so long."""
        relative = seconds / self.seconds(rows)
        self._drift += DRIFT_SMOOTHING * (min(relative, 4 * self._drift) - self._drift)
        index = bisect.bisect_left(self._rows, rows)
        if index < len(self._rows) and self._rows[index] == rows:
            expected = seconds / self._drift
            bounded = min(max(expected, 0.5 * self._seconds[index]), 2 * self._seconds[index])  # a disturbed step
            self._seconds[index] += SMOOTHING * (bounded - self._seconds[index])
