"""How long a run takes: what its parts cost by nominal speeds, corrected by how long those took that are done."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping

Part = tuple[str, Hashable]
"""A group of rows, and a part of it."""


class Progress:
    """Tells at each part's end how much is left; `costs` are the seconds that each part should take."""

    def __init__(self, costs: Mapping[Part, float]) -> None:
        self._left_s, self._num_parts, self._done_s = dict(costs), len(costs), 0.0
        self._started = time.monotonic()
        print(f"{len(costs)} parts, about {minutes(sum(costs.values()))} min on two quiet cores", flush=True)

    def advance(self, part: Part) -> None:
        self._done_s += self._left_s.pop(part)
        passed_s = time.monotonic() - self._started
        left_s = sum(self._left_s.values()) * passed_s / self._done_s
        done = f"{self._num_parts - len(self._left_s)} of {self._num_parts} parts"
        print(f"-- {done} in {minutes(passed_s)} min, about {minutes(left_s)} min left", flush=True)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"
