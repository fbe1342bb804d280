"""The report of a soak: a page in Markdown, and its plots."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.documents import processor
from benchmarks.soak.clients import KINDS
from benchmarks.soak.judging import Check, Soak
from server.bench.charts import Points, line_chart

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_WINDOWS = 60
"""Windows of the time, for each of which there are percentiles."""
MIN_IN_WINDOW = 5
"""Requests of a window that has percentiles."""


def write_report(soak: Soak, checks: Sequence[Check], command: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    charts = charts_of(soak)
    verdict = "passed" if all(check.is_ok for check in checks) else "FAILED"
    for name, (title, series) in charts.items():
        (folder / f"{name}.svg").write_text(line_chart(title, series))
    pictures = [f"![{title}]({name}.svg)" for name, (title, _) in charts.items()]
    page = [
        "# The last soak",
        "",
        f"`{command}`, written by `benchmarks/soak`: **{verdict}**.",
        "",
        *circumstances(soak),
        "",
        *table_of(checks),
        "",
        "Descriptors, tasks and threads are compared with those of the idle server after a first while of the same",
        "load, which starts every process. Memory may grow by 3 % or 20 MB, the larger of the two, from the median of",
        "the first part of the time (10 to 30 %) to that of the last fifth, and by no more along the line through all",
        "samples. Anonymous memory is what no file stands behind: the heap and the KV cache.",
        "A restart ends all clients in the middle of what they do, as a deployment of theirs would, and new ones",
        "begin; the server is started once and runs to the end.",
        "",
        *outcomes_of(soak),
        "",
        *pictures,
        "",
    ]
    (folder / "README.md").write_text("\n".join(page))


def circumstances(soak: Soak) -> list[str]:
    load = [sample.load_average for sample in soak.samples]
    return [
        f"- {datetime.date.today().isoformat()}, commit {commit()}, {soak.seconds / 60:.1f} minutes",
        f"- {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}; load average of the machine "
        f"{statistics.median(load):.1f} in the median, {max(load):.1f} at most",
        f"- {soak.tally.num_requests} requests, {60 * soak.tally.num_requests / soak.seconds:.0f} a minute",
    ]


def commit() -> str:
    """The commit that ran, and whether files differed from it."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def table_of(checks: Sequence[Check]) -> list[str]:
    rows = [
        f"| {'ok' if check.is_ok else 'FAILED'} | {check.name} | {'; '.join(check.complaints) or check.figures} |"
        for check in checks
    ]
    return ["| | check | figures |", "|---|---|---|", *rows]


def outcomes_of(soak: Soak) -> list[str]:
    rows = []
    for kind in KINDS:
        counts = sorted(soak.tally.outcomes[kind.name].items())
        rows.append(f"| {kind.name} | {', '.join(f'{outcome}: {count}' for outcome, count in counts)} |")
    return ["| clients | outcomes |", "|---|---|", *rows]


def charts_of(soak: Soak) -> dict[str, tuple[str, dict[str, Points]]]:
    """Name of the file -> title and lines."""
    modules = list(soak.base.processes)

    def of_modules(names: Sequence[str], field: str, unit: float = 1.0) -> dict[str, Points]:
        return {
            name: [
                (sample.seconds / 60, getattr(sample.processes[name], field) / unit)
                for sample in soak.samples
                if name in sample.processes
            ]
            for name in names
        }

    others = [name for name in modules if name != "engine"]
    blocks: dict[str, Points] = {
        name.removeprefix("pytgi_"): [(sample.seconds / 60, sample.metrics[name]) for sample in soak.samples]
        for name in ("pytgi_kv_blocks_used", "pytgi_requests_running", "pytgi_requests_waiting")
    }
    tasks = {"asyncio tasks": [(sample.seconds / 60, float(sample.num_tasks)) for sample in soak.samples]}
    charts: dict[str, tuple[str, dict[str, Points]]] = {
        "memory": ("Resident memory, MB, of all but the engine", of_modules(others, "resident", 1e6)),
        "engine": (
            "Memory of the engine, MB",
            {
                "resident": of_modules(["engine"], "resident", 1e6)["engine"],
                "anonymous": of_modules(["engine"], "anonymous", 1e6)["engine"],
            },
        ),
        "descriptors": ("Descriptors; tasks of the HTTP process", of_modules(modules, "descriptors") | tasks),
        "threads": ("Threads", of_modules(modules, "threads")),
        "blocks": ("KV blocks used, requests", blocks),
        "latency": ("Time of the repeated requests, seconds", percentiles_of(soak)),
    }
    return charts


def percentiles_of(soak: Soak) -> dict[str, Points]:
    """p50, p90 and p99 of the times of repeated requests, window by window."""
    windows: list[list[float]] = [[] for _ in range(NUM_WINDOWS)]
    for moment, seconds in soak.tally.durations:
        windows[min(NUM_WINDOWS - 1, int(NUM_WINDOWS * moment / soak.seconds))].append(seconds)
    lines: dict[str, Points] = {}
    for percent in (50, 90, 99):
        lines[f"p{percent}"] = [
            ((number + 0.5) * soak.seconds / 60 / NUM_WINDOWS, percentile(values, percent))
            for number, values in enumerate(windows)
            if len(values) >= MIN_IN_WINDOW
        ]
    return lines


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
