"""The figures of the dashboard, from the families of /metrics: what happened within a second, how long things took.

Nothing is counted for it besides, so a server that nobody watches does no work for it.
"""

from __future__ import annotations

import collections
import itertools
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.link.messages import EngineStats
from server.telemetry.families import Histogram
from server.telemetry.metrics import Metrics

PERIOD_S = 1.0
"""Seconds from one line to the next."""
WINDOW_PERIODS = 10
"""Quantiles are of so many periods: one of them alone has too few requests."""
PROC = Path("/proc")


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Median, 90th and 99th percentile of some times, in seconds."""

    p50: float
    p90: float
    p99: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A server's figures: rates since the line before, quantiles of the last ten lines, the rest as it is now."""

    requests_running: int
    requests_waiting: int
    requests_finished_per_s: float
    requests_failed_per_s: float
    tokens_per_s: float
    """Tokens that were generated."""
    prompt_tokens_per_s: float
    """Tokens of the prompts that were accepted."""
    prefix_hit_tokens_per_s: float
    """Tokens of prompts that were found in the prefix cache."""
    draft_tokens_per_s: float
    """Tokens that speculation guessed."""
    draft_tokens_accepted_per_s: float
    preemptions_per_s: float
    steps_per_s: float
    first_token_s: Quantiles | None
    """Seconds from a request's entry to its first token; None, here and below: there was nothing to time."""
    inter_token_s: Quantiles | None
    prefill_step_s: Quantiles | None
    """Seconds of a step that computes a part of a prompt."""
    decode_step_s: Quantiles | None
    kv_tokens_used: int
    """Tokens of KV memory that requests hold."""
    kv_tokens_cached: int
    """Tokens of KV memory that are kept for prefixes."""
    kv_tokens_total: int
    server_memory_bytes: int | None
    """Resident memory of the HTTP process; None, here and below: unknown."""
    engine_memory_bytes: int | None
    """Resident memory of the engine's first rank."""


class Line(msgspec.Struct, frozen=True):
    """One second of all replicas."""

    replicas: dict[str, Figures]
    """Name -> figures. A server by itself is one replica."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """Everything since the start, at one moment."""

    moment_s: float
    counters: Mapping[str, float]
    """Field of `Figures` -> count."""
    buckets: Mapping[str, Sequence[int]]
    """Field of `Figures` -> observations per bucket."""


class Sampler:
    """Reads the families once a period, and tells what has changed."""

    def __init__(
        self,
        metrics: Metrics,
        read_stats: Callable[[], EngineStats],
        engine_pid: int | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """The first period begins now. `engine_pid` is the process of the engine's first rank, if that is known."""
        self._read_stats = read_stats
        self._engine_pid = engine_pid
        self._clock = clock
        self._metrics = metrics
        requests, steps = metrics.requests, metrics.steps
        self._histograms: dict[str, tuple[Histogram, str]] = {
            "first_token_s": (requests.time_to_first_token, ""),
            "inter_token_s": (requests.inter_token, ""),
            "prefill_step_s": (steps.duration, "prefill"),
            "decode_step_s": (steps.duration, "decode"),
        }
        self._window = collections.deque([self._count(read_stats())], WINDOW_PERIODS)

    def sample(self) -> Figures:
        """The figures of the period that ends now."""
        stats = self._read_stats()
        before, oldest, now = self._window[-1], self._window[0], self._count(stats)
        self._window.append(now)
        seconds = now.moment_s - before.moment_s
        rates = {name: round((count - before.counters[name]) / seconds, 2) for name, count in now.counters.items()}
        times = {
            name: _quantiles(histogram.bounds, oldest.buckets[name], now.buckets[name])
            for name, (histogram, _) in self._histograms.items()
        }
        gauges = {
            "requests_running": stats.num_running,
            "requests_waiting": stats.num_waiting,
            "kv_tokens_used": stats.num_used_blocks * stats.block_size,
            "kv_tokens_cached": stats.num_cached_blocks * stats.block_size,
            "kv_tokens_total": stats.num_blocks * stats.block_size,
            "server_memory_bytes": resident_bytes(os.getpid()),
            "engine_memory_bytes": resident_bytes(self._engine_pid),
        }
        return msgspec.convert({**gauges, **rates, **times}, Figures)

    def _count(self, stats: EngineStats) -> _Counts:
        requests, steps = self._metrics.requests, self._metrics.steps
        hits = requests.skipped_tokens
        num_tokens = hits.count + hits.total  # a sequence's step gives the draft's tokens that hit, and one more
        counters = {
            "requests_finished_per_s": requests.success.total,
            "requests_failed_per_s": requests.failure.total,
            "tokens_per_s": num_tokens,
            "prompt_tokens_per_s": requests.input_length.total,
            "prefix_hit_tokens_per_s": stats.num_prefix_hit_tokens,
            "draft_tokens_per_s": stats.num_drafted_tokens,
            "draft_tokens_accepted_per_s": stats.num_accepted_tokens,
            "preemptions_per_s": stats.num_preemptions,
            "steps_per_s": steps.count.total,
        }
        buckets = {name: histogram.counts(label) for name, (histogram, label) in self._histograms.items()}
        return _Counts(self._clock(), counters, buckets)


def _quantiles(bounds: Sequence[float], before: Sequence[int], now: Sequence[int]) -> Quantiles | None:
    """Quantiles of what was observed since `before`; None if nothing was."""
    counts = [later - earlier for later, earlier in itertools.zip_longest(now, before, fillvalue=0)]
    if not sum(counts):
        return None
    p50, p90, p99 = (round(quantile(bounds, counts, part), 6) for part in (0.5, 0.9, 0.99))
    return Quantiles(p50=p50, p90=p90, p99=p99)


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float:
    """An estimate of what `part` of the observations, of which there is at least one, do not exceed.

    Observations count as spread evenly within their bucket, those above all bounds as equal to the last one.
    """
    rank = part * sum(counts)
    seen = 0
    for index, count in enumerate(counts[: len(bounds)]):
        if count and seen + count >= rank:
            lower = bounds[index - 1] if index else 0.0
            return lower + (bounds[index] - lower) * (rank - seen) / count
        seen += count
    return bounds[-1]


def resident_bytes(pid: int | None) -> int | None:
    """Memory of a process; None if it is unknown, as where there is no /proc."""
    if pid is None:
        return None
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
