"""The kinds of metric and their text for Prometheus.

Written by hand: `prometheus_client` would add `_total` to counters, and an observation here is one bisection and two
additions.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Protocol

DURATION_BOUNDS = tuple(itertools.accumulate([1.5] * 35, operator.mul, initial=0.0001))[1:]
"""Seconds; multiplied one by one, as TGI does: the digits of the bounds are part of their names."""
QUANTILES = (0, 0.5, 0.9, 0.95, 0.99, 0.999, 1)


class Family(Protocol):
    """One name of /metrics. `samples` are the lines of the exposition: none before the first observation."""

    kind: str
    name: str
    help: str

    def samples(self) -> Iterator[str]: ...


class Counter:
    """A count, or one for each value of `label`. The values of `preset` are there from the start."""

    kind = "counter"

    def __init__(self, name: str, help: str, label: str = "", preset: Iterable[str] = ()) -> None:
        self.name, self.help, self._label = name, help, label
        self._counts: dict[str, int] = dict.fromkeys(preset, 0)

    def increment(self, label_value: str = "") -> None:
        self._counts[label_value] = self._counts.get(label_value, 0) + 1

    @property
    def total(self) -> int:
        """The count over all values of the label."""
        return sum(self._counts.values())

    def samples(self) -> Iterator[str]:
        for value, count in self._counts.items():
            labels = f'{{{self._label}="{value}"}}' if self._label else ""
            yield f"{self.name}{labels} {count}"


class Histogram:
    """Counts per bucket, or such a row of counts for each value of `label`."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float] = DURATION_BOUNDS, label: str = "") -> None:
        self.name, self.help, self._label = name, help, label
        self.bounds = bounds
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, value: float, label_value: str = "", times: int = 1) -> None:
        counts = self._counts.get(label_value)
        if counts is None:
            counts = self._counts[label_value] = [0] * (len(self.bounds) + 1)
            self._sums[label_value] = 0
        counts[bisect.bisect_left(self.bounds, value)] += times
        self._sums[label_value] += value * times

    def counts(self, label_value: str = "") -> Sequence[int]:
        """Observations per bucket up to now, the last one above all bounds; empty before the first."""
        return tuple(self._counts.get(label_value, ()))

    @property
    def total(self) -> float:
        """The sum of all that was observed."""
        return sum(self._sums.values())

    def samples(self) -> Iterator[str]:
        for value, counts in self._counts.items():
            labels = f'{self._label}="{value}"' if self._label else ""
            separator, braced = ("," if labels else ""), (f"{{{labels}}}" if labels else "")
            for bound, count in zip([*map(_number, self.bounds), "+Inf"], itertools.accumulate(counts), strict=True):
                yield f'{self.name}_bucket{{{labels}{separator}le="{bound}"}} {count}'
            yield f"{self.name}_sum{braced} {_number(self._sums[value])}"
            yield f"{self.name}_count{braced} {sum(counts)}"


class Summary:
    """Exact quantiles, since the start, of small whole numbers."""

    kind = "summary"

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self._counts: collections.Counter[int] = collections.Counter()

    def observe(self, values: Iterable[int]) -> None:
        self._counts.update(values)

    @property
    def count(self) -> int:
        return self._counts.total()

    @property
    def total(self) -> int:
        """The sum of all that was observed."""
        return sum(value * count for value, count in self._counts.items())

    def samples(self) -> Iterator[str]:
        if not self.count:
            return
        values = sorted(self._counts)
        ends = list(itertools.accumulate(self._counts[value] for value in values))
        for quantile in QUANTILES:
            rank = max(1, quantile * self.count)
            yield f'{self.name}{{quantile="{_number(quantile)}"}} {values[bisect.bisect_left(ends, rank)]}'
        yield f"{self.name}_sum {self.total}"
        yield f"{self.name}_count {self.count}"


class Reading:
    """A number that is read when /metrics is."""

    def __init__(self, name: str, kind: str, help: str, value: int) -> None:
        self.name, self.kind, self.help, self._value = name, kind, help, value

    def samples(self) -> Iterator[str]:
        yield f"{self.name} {self._value}"


class Registry:
    """Makes families and keeps them in the order of the exposition."""

    def __init__(self, *, has_presets: bool) -> None:
        """`has_presets`: counters start at 0. Otherwise they appear with their first observation."""
        self._has_presets = has_presets
        self._families: list[Family] = []

    def counter(self, name: str, help: str, label: str = "", values: Iterable[str] = ("",)) -> Counter:
        """`values` are the values of `label` that are known."""
        counter = Counter(name, help, label, values if self._has_presets else ())
        self._families.append(counter)
        return counter

    def histogram(self, name: str, help: str, bounds: Sequence[float] = DURATION_BOUNDS, label: str = "") -> Histogram:
        histogram = Histogram(name, help, bounds, label)
        self._families.append(histogram)
        return histogram

    def summary(self, name: str, help: str) -> Summary:
        summary = Summary(name, help)
        self._families.append(summary)
        return summary

    def render(self, readings: Iterable[Reading]) -> str:
        """The exposition: the families' observations so far, then `readings`."""
        parts = []
        for family in (*self._families, *readings):
            if samples := list(family.samples()):
                head = [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
                parts.append("\n".join([*head, *samples, "\n"]))
        return "".join(parts)


def _number(value: float) -> str:
    """The number as Rust prints it: no `.0`, no exponent, the shortest digits that are the same number."""
    return f"{Decimal(repr(value)):f}".removesuffix(".0")
