"""The figures of the dashboard: rates since the line before, quantiles of the last lines, gauges as they are."""

from __future__ import annotations

import itertools
import os
import random
import statistics
from pathlib import Path

import pytest

from engine.link.messages import EngineStats, StepOutput, StepReport
from server.telemetry import live
from server.telemetry.families import DURATION_BOUNDS, Histogram
from server.telemetry.live import WINDOW_PERIODS, Figures, Sampler, quantile, resident_bytes
from server.telemetry.metrics import Metrics
from tests.unit.server.harness import LIMITS


class Server:
    """A server's counts, and a clock that each sample moves on by two seconds."""

    def __init__(self) -> None:
        self.metrics = Metrics(LIMITS, is_strict=False)
        self.stats = EngineStats()
        self.sampler = Sampler(self.metrics, lambda: self.stats, None, itertools.count(0.0, 2.0).__next__)

    def sample(self) -> Figures:
        return self.sampler.sample()


@pytest.fixture
def server() -> Server:
    return Server()


def test_rates_are_those_since_the_line_before(server: Server) -> None:
    request = server.metrics.entered()
    request.accepted(30, 10)
    server.stats = EngineStats(num_prefix_hit_tokens=16, num_drafted_tokens=8, num_accepted_tokens=5, num_preemptions=1)
    steps = [StepReport(num_draft_hits=[3, 0]), StepReport(num_draft_hits=[2]), StepReport(is_failed=True)]
    server.metrics.observe_output(StepOutput(events=[], stats=server.stats, reports=steps), 0.0)
    figures = server.sample()
    assert figures.tokens_per_s == (4 + 1 + 3) / 2, "a sequence's step gives what its draft hit, and one more"
    assert figures.prompt_tokens_per_s == 15
    assert figures.prefix_hit_tokens_per_s == 8
    assert (figures.draft_tokens_per_s, figures.draft_tokens_accepted_per_s) == (4, 2.5)
    assert figures.preemptions_per_s == 0.5
    assert figures.steps_per_s == 1.5
    later = server.sample()
    assert later.tokens_per_s == later.prompt_tokens_per_s == later.steps_per_s == later.preemptions_per_s == 0


def test_what_was_before_the_first_line_does_not_count(server: Server) -> None:
    server.metrics.entered().accepted(30, 10)
    server.sampler = Sampler(server.metrics, lambda: server.stats, None)
    assert server.sample().prompt_tokens_per_s == 0


def test_ends_and_failures_are_told_apart(server: Server) -> None:
    requests = server.metrics.requests
    requests.success.increment()
    requests.failure.increment("overloaded")
    requests.failure.increment("dropped")
    figures = server.sample()
    assert (figures.requests_finished_per_s, figures.requests_failed_per_s) == (0.5, 1)


def test_gauges_are_those_of_the_last_step(server: Server) -> None:
    server.stats = EngineStats(
        num_running=3, num_waiting=2, num_used_blocks=5, num_cached_blocks=1, num_blocks=9, block_size=16
    )
    figures = server.sample()
    assert (figures.requests_running, figures.requests_waiting) == (3, 2)
    assert (figures.kv_tokens_used, figures.kv_tokens_cached, figures.kv_tokens_total) == (80, 16, 144)


def test_times_are_told_while_they_are_among_the_last_lines(server: Server) -> None:
    request = server.metrics.entered()
    request.received(1, 0.2, is_first=True)
    request.received(2, 0.1, is_first=False)
    reports = [StepReport(is_prefill=True, total_s=0.5), StepReport(total_s=0.01)]
    server.metrics.observe_output(StepOutput(events=[], stats=server.stats, reports=reports), 0.0)
    for _ in range(WINDOW_PERIODS):
        figures = server.sample()
        times = (figures.first_token_s, figures.inter_token_s, figures.prefill_step_s, figures.decode_step_s)
        for told, true in zip(times, (0.2, 0.05, 0.5, 0.01), strict=True):
            assert told is not None
            assert true / 1.5 < told.p50 <= told.p90 <= told.p99 < true * 1.5
    figures = server.sample()
    assert figures.first_token_s is figures.inter_token_s is figures.prefill_step_s is figures.decode_step_s is None


@pytest.mark.parametrize("part", [0.5, 0.9, 0.99])
def test_a_quantile_is_within_its_bucket_of_the_true_one(part: float) -> None:
    numbers = random.Random(3)
    values = [numbers.lognormvariate(-3, 1) for _ in range(5_000)]
    histogram = Histogram("h", "")
    for value in values:
        histogram.observe(value)
    true = statistics.quantiles(values, n=100)[round(part * 100) - 1]
    told = quantile(DURATION_BOUNDS, histogram.counts(), part)
    assert true == pytest.approx(told, rel=0.1)


@pytest.mark.parametrize(
    ("counts", "part", "told"),
    [
        ([0, 4, 0, 0], 0.5, 1.5),
        ([4, 0, 0, 0], 0.5, 0.5),
        ([1, 0, 1, 0], 0.5, 1.0),
        ([1, 0, 1, 0], 0.99, 3.96),
        ([0, 0, 0, 9], 0.5, 4.0),
        ([1, 0, 0, 9], 0.01, 0.1),
    ],
)
def test_values_are_spread_within_a_bucket_and_the_last_bound_is_the_most(
    counts: list[int], part: float, told: float
) -> None:
    assert quantile([1.0, 2.0, 4.0], counts, part) == pytest.approx(told)


def test_memory_is_that_of_a_process_or_unknown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = server.sample()
    assert figures.server_memory_bytes is not None and 1 << 20 < figures.server_memory_bytes < 1 << 36
    assert figures.engine_memory_bytes is None
    assert resident_bytes(1 << 30) is None, "no such process"
    monkeypatch.setattr(live, "PROC", tmp_path)
    assert resident_bytes(os.getpid()) is None, "no /proc"
