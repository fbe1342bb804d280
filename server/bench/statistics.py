"""Percentiles with confidence intervals, throughput and goodput of a set of records."""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from server.bench.records import Record

PERCENTILES = (50, 90, 99)
NUM_RESAMPLES = 200
MAX_BOOTSTRAP_VALUES = 20_000
CONFIDENCE = 0.95

METRICS: dict[str, tuple[str, Callable[[Record], Sequence[float]]]] = {
    "ttft": ("Time to first token", lambda record: [record.time_to_first_token_s]),
    "inter_token": ("Between tokens", lambda record: record.gaps_s),
    "tpot": (
        "Per output token",
        lambda record: [] if (mean := record.time_per_output_token_s) is None else [mean],
    ),
    "e2e": ("End to end", lambda record: [record.end_to_end_s]),
}
"""Key -> title, and a request's values in seconds."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """A server under one load."""

    num_completed: int
    failures: Mapping[str, int]
    """Text -> number of requests."""
    duration_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    is_counted_by_server: bool
    """Whether all numbers of output tokens are the server's, and not of events."""
    goodput_per_s: float | None
    """Requests per second that kept every objective; None: there are no objectives."""
    latencies: Mapping[str, Mapping[int, Estimate]]
    """Key of METRICS -> percentile -> seconds; without what no request has."""

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.duration_s if self.duration_s else 0.0

    @property
    def requests_per_s(self) -> float:
        return self.num_completed / self.duration_s if self.duration_s else 0.0


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two nearest of at least one value, as NumPy's default."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def estimates(groups: Sequence[Sequence[float]], rng: random.Random) -> dict[int, Estimate]:
    """Percentiles of all values; intervals from drawing whole groups, since values of one request hang together."""
    values = sorted(value for group in groups for value in group)
    if not values:
        return {}
    kept = [group for group in groups if group]
    stride = math.ceil(len(values) / MAX_BOOTSTRAP_VALUES)
    samples: dict[int, list[float]] = {percent: [] for percent in PERCENTILES}
    for _ in range(NUM_RESAMPLES):
        drawn = sorted(value for group in rng.choices(kept, k=len(kept)) for value in group[::stride])
        for percent, results in samples.items():
            results.append(percentile(drawn, percent))
    return {percent: _estimate(percentile(values, percent), sorted(results)) for percent, results in samples.items()}


def _estimate(value: float, ordered: Sequence[float]) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    return Estimate(value, percentile(ordered, tail), percentile(ordered, 100 - tail))


def summarize(rounds: Sequence[Sequence[Record]], objectives: Mapping[str, float], seed: int) -> Summary:
    """One server's rounds under one load; the time between rounds does not count."""
    records = [record for round_ in rounds for record in round_]
    completed = [record for record in records if record.failure is None]
    duration_s = sum(
        max(record.ended for record in round_) - min(record.started for record in round_) for round_ in rounds if round_
    )
    rng = random.Random(seed)
    latencies = {key: estimates([values(record) for record in completed], rng) for key, (_, values) in METRICS.items()}
    num_good = sum(is_good(record, objectives) for record in completed)
    return Summary(
        len(completed),
        dict(collections.Counter(record.failure for record in records if record.failure is not None)),
        duration_s,
        sum(record.num_prompt_tokens for record in completed),
        sum(record.num_output_tokens for record in completed),
        all(record.is_counted_by_server for record in completed),
        num_good / duration_s if objectives and duration_s else None,
        {key: by_percentile for key, by_percentile in latencies.items() if by_percentile},
    )


def is_good(record: Record, objectives: Mapping[str, float]) -> bool:
    """Whether no value of the request is above its objective, in seconds."""
    return all(value <= limit for key, limit in objectives.items() for value in METRICS[key][1](record))


def ratio(ours: Sequence[float], theirs: Sequence[float], rng: random.Random) -> Estimate:
    """Median of the ratios of pairs, theirs over ours."""
    pairs = [other / own for own, other in zip(ours, theirs, strict=True)]
    medians = sorted(percentile(sorted(rng.choices(pairs, k=len(pairs))), 50) for _ in range(NUM_RESAMPLES))
    return _estimate(percentile(sorted(pairs), 50), medians)
