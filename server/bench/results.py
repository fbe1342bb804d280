"""Summaries of servers under loads -> a report: tables, plots, and the numbers for programs."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.bench.records import Record
from server.bench.reports import Chart, Report, Table
from server.bench.statistics import METRICS, PERCENTILES, Estimate, Summary, ratio, summarize

COUNTED_EVENTS = (
    "A server did not say how many tokens it made (no `usage`): its events with text were counted, which may hold "
    "several tokens or none."
)
RATIOS: dict[str, bool] = {"Output tokens per second": True, **{title: False for title, _ in METRICS.values()}}
"""What is compared -> whether more is better. Times are medians."""


@dataclass(frozen=True)
class Level:
    """All rounds of all servers under one load."""

    name: str
    rounds: Mapping[str, Sequence[Sequence[Record]]]
    """Server -> the records of each round."""


def build_report(
    parameters: Mapping[str, Any], levels: Sequence[Level], objectives: Mapping[str, float], seed: int
) -> Report:
    summaries = [
        (level.name, server, summarize(rounds, objectives, seed))
        for level in levels
        for server, rounds in level.rounds.items()
        if any(rounds)
    ]
    tables = [
        Table("Parameters", ["parameter", "value"], [[name, str(value)] for name, value in parameters.items()]),
        _throughput(summaries),
        _latency(summaries),
    ]
    comparisons = [(level.name, compare(level, seed)) for level in levels if len(level.rounds) == 2]
    failures = [[*place, text, str(count)] for *place, summary in summaries for text, count in summary.failures.items()]
    if any(ratios for _, ratios in comparisons):
        tables.append(_ratios(comparisons))
    if failures:
        tables.append(Table("Failures", ["load", "server", "what was said", "requests"], failures))
    data = {
        "parameters": dict(parameters),
        "levels": [{"load": load, "server": server, **_as_data(summary)} for load, server, summary in summaries],
        "ratios": {
            load: {name: dataclasses.asdict(estimate) for name, estimate in ratios.items()}
            for load, ratios in comparisons
        },
    }
    is_counted = all(summary.is_counted_by_server for _, _, summary in summaries)
    return Report(data, tables, list(_charts(levels)), [] if is_counted else [COUNTED_EVENTS])


def _as_data(summary: Summary) -> dict[str, Any]:
    return {
        **dataclasses.asdict(summary),
        "output_tokens_per_s": summary.output_tokens_per_s,
        "requests_per_s": summary.requests_per_s,
        "latencies": {
            key: {f"p{percent}": dataclasses.asdict(estimate) for percent, estimate in by_percentile.items()}
            for key, by_percentile in summary.latencies.items()
        },
    }


def _throughput(summaries: Sequence[tuple[str, str, Summary]]) -> Table:
    columns = "load|server|requests|failed|seconds|prompt tokens|output tokens|output tokens/s|requests/s|goodput/s"
    rows = [
        [
            load,
            server,
            str(summary.num_completed),
            str(sum(summary.failures.values())),
            f"{summary.duration_s:.2f}",
            str(summary.num_prompt_tokens or "not said"),
            str(summary.num_output_tokens),
            f"{summary.output_tokens_per_s:.1f}",
            f"{summary.requests_per_s:.2f}",
            "" if summary.goodput_per_s is None else f"{summary.goodput_per_s:.2f}",
        ]
        for load, server, summary in summaries
    ]
    return Table("Throughput", columns.split("|"), rows)


def _latency(summaries: Sequence[tuple[str, str, Summary]]) -> Table:
    rows = [
        [load, server, METRICS[key][0], *(shown(1000 * part for part in _parts(by[p])) for p in PERCENTILES)]
        for load, server, summary in summaries
        for key, by in summary.latencies.items()
    ]
    columns = ["load", "server", "time", *(f"p{percent}" for percent in PERCENTILES)]
    return Table("Latency in ms (95 % confidence)", columns, rows)


def _parts(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def shown(parts: Iterator[float], digits: int = 1) -> str:
    value, low, high = (f"{part:.{digits}f}" for part in parts)
    return f"{value} ({low} to {high})"


def compare(level: Level, seed: int) -> dict[str, Estimate]:
    """Ratios of the second server to the first, over the rounds in which both completed something."""
    both = [
        tuple(_figures(records) for records in pair)
        for pair in zip(*level.rounds.values(), strict=False)
        if all(any(record.failure is None for record in records) for records in pair)
    ]
    rng = random.Random(seed)
    results = {}
    for name in RATIOS:
        pairs = [(first[name], second[name]) for first, second in both if first.get(name) and second.get(name)]
        if pairs:
            results[name] = ratio([own for own, _ in pairs], [other for _, other in pairs], rng)
    return results


def _figures(records: Sequence[Record]) -> dict[str, float]:
    summary = summarize([records], {}, 0)
    medians = {METRICS[key][0]: by_percentile[50].value for key, by_percentile in summary.latencies.items()}
    return {"Output tokens per second": summary.output_tokens_per_s, **medians}


def _ratios(comparisons: Sequence[tuple[str, Mapping[str, Estimate]]]) -> Table:
    rows = [
        [load, name, "more" if RATIOS[name] else "less", shown(iter(_parts(estimate)), 3)]
        for load, ratios in comparisons
        for name, estimate in ratios.items()
    ]
    columns = ["load", "medians of", "better is", "second / first server (95 % confidence)"]
    return Table("Ratios of interleaved rounds", columns, rows)


def _charts(levels: Sequence[Level]) -> Iterator[Chart]:
    """For each kind of time the part of all values that are not above it."""
    for title, values in METRICS.values():
        series = {}
        for level, server in itertools.chain.from_iterable(((lv, name) for name in lv.rounds) for lv in levels):
            records = [record for round_ in level.rounds[server] for record in round_ if record.failure is None]
            times = sorted(1000 * value for record in records for value in values(record))
            if times:
                points = [(time, 100 * (index + 1) / len(times)) for index, time in enumerate(times)]
                series[f"{server}, {level.name}"] = points
        if series:
            yield Chart(f"{title}: % of values up to", series, "ms")
