"""What is wrong after a soak: from what was seen to checks, each with its complaints and its figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.soak.clients import KINDS, OTHER_ANSWER
from benchmarks.soak.load import Tally
from benchmarks.soak.samples import ProcessSample, Sample, leftovers

FIRST_PART = (0.1, 0.3)
LAST_PART = (0.8, 1.0)
"""The parts of the time whose medians are compared."""
MAX_GROWTH = 0.03
MAX_GROWTH_BYTES = 20e6
"""Memory may grow by the larger of the two from the first part to the last."""
MAX_NEW_THREADS = 4
"""Pools start their threads when they are needed for the first time, up to 6 on two cores."""
MIN_SAMPLES = 10
BROKEN = re.compile(r"Traceback|panicked|Segmentation|INTERNAL")


@dataclass(frozen=True)
class Soak:
    """Everything that was seen."""

    seconds: float
    """The length of the load, without what came before its first sample."""
    base: Sample
    """The idle server after a first while of the load, which starts all its processes and threads."""
    samples: Sequence[Sample]
    """The server under the load; their seconds begin at 0."""
    final: Sample
    """The idle server at the end."""
    tally: Tally
    log: str
    exit_code: int
    num_survivors: int
    """Processes of the server that are there after its end."""


@dataclass(frozen=True)
class Check:
    """One thing that has to hold."""

    name: str
    figures: str
    complaints: Sequence[str] = ()

    @property
    def is_ok(self) -> bool:
        return not self.complaints


@dataclass(frozen=True)
class Growth:
    """A process's memory over the time, in bytes."""

    first: float
    last: float
    bytes_per_hour: float
    """The slope of the straight line through all samples from the first part on."""
    projected: float
    """What that slope makes of this time."""

    @property
    def allowed(self) -> float:
        return max(MAX_GROWTH * self.first, MAX_GROWTH_BYTES)

    @property
    def is_ok(self) -> bool:
        return max(self.last - self.first, self.projected) <= self.allowed


def growth_of(soak: Soak, module: str, field: Callable[[ProcessSample], int]) -> Growth:
    points = [
        (sample.seconds, field(sample.processes[module])) for sample in soak.samples if module in sample.processes
    ]

    def part(first: float, last: float) -> list[tuple[float, int]]:
        inside = [point for point in points if first * soak.seconds <= point[0] <= last * soak.seconds]
        return inside or points

    settled = part(FIRST_PART[0], LAST_PART[1])
    seconds, values = zip(*settled, strict=True)
    slope = statistics.linear_regression(seconds, values).slope if len(set(seconds)) > 1 else 0.0
    medians = [statistics.median(value for _, value in part(*ends)) for ends in (FIRST_PART, LAST_PART)]
    return Growth(medians[0], medians[1], 3600 * slope, slope * (seconds[-1] - seconds[0]))


def check_memory(soak: Soak, module: str) -> Check:
    figures, complaints = [], []
    for name, field in (("resident", resident), ("anonymous", anonymous)):
        growth = growth_of(soak, module, field)
        text = (
            f"{name} {growth.first / 1e6:.1f} MB at first, {growth.last / 1e6:.1f} at last, "
            f"{growth.bytes_per_hour / 1e6:+.1f} MB an hour"
        )
        figures.append(text)
        complaints += [] if growth.is_ok else [f"{text}; {growth.allowed / 1e6:.1f} MB more are allowed"]
    return Check(f"memory of {module}", "; ".join(figures), complaints)


def resident(process: ProcessSample) -> int:
    return process.resident


def anonymous(process: ProcessSample) -> int:
    return process.anonymous


def check_answers(soak: Soak) -> Check:
    """Every client gets what it should; those that leave get nothing."""
    outcomes = soak.tally.outcomes
    complaints = [
        f"{kind.name}: {outcome}, {count} times"
        for kind in KINDS
        for outcome, count in sorted(outcomes[kind.name].items())
        if outcome not in (kind.good, OTHER_ANSWER)
    ]
    return Check("answers", f"{soak.tally.num_requests} requests, {soak.tally.num_wrong} wrong", complaints)


def check_repeats(soak: Soak) -> Check:
    counts = soak.tally.outcomes[KINDS[0].name]
    num_others = counts[OTHER_ANSWER]
    complaints = [f"{num_others} answers differ from the first ones"] if num_others else []
    return Check(
        "ids, texts and logprobs", f"{counts.total()} repeated requests, {num_others} other answers", complaints
    )


def check_coverage(soak: Soak) -> Check:
    """A load that lacks something proves nothing about it."""
    complaints = [f"no client did this: {kind.name}" for kind in KINDS if not soak.tally.outcomes[kind.name]]
    if len(soak.samples) < MIN_SAMPLES:
        complaints.append(f"{len(soak.samples)} samples are too few")
    figures = (
        f"{len(KINDS)} kinds of clients, {soak.tally.num_restarts} restarts of all clients, {len(soak.samples)} samples"
    )
    return Check("coverage", figures, complaints)


def check_leftovers(soak: Soak) -> Check:
    base, final = soak.base, soak.final
    figures = [f"{name} {final.processes[name].descriptors}" for name in base.processes if name in final.processes]
    return Check(
        "processes, descriptors and tasks", f"{', '.join(figures)}; {final.num_tasks} tasks", leftovers(base, final)
    )


def check_threads(soak: Soak) -> Check:
    base, final = soak.base.processes, soak.final.processes
    pairs = {name: (base[name].threads, final[name].threads) for name in base if name in final}
    complaints = [
        f"{name}: {after} threads, {before} before"
        for name, (before, after) in pairs.items()
        if after > before + MAX_NEW_THREADS
    ]
    return Check("threads", ", ".join(f"{name} {after}" for name, (_, after) in pairs.items()), complaints)


def check_presence(soak: Soak) -> Check:
    base, final = soak.base.processes, soak.final.processes
    complaints = [f"{name} is gone" for name in base if name not in final]
    return Check("nothing is gone", f"{len(final)} modules", complaints)


def check_blocks(soak: Soak) -> Check:
    held = {name: value for name, value in soak.final.metrics.items() if value and not soak.final.is_idle}
    complaints = [f"{name} is {value:.0f}" for name, value in held.items()]
    return Check("KV blocks and queues", f"{soak.final.metrics['pytgi_kv_blocks_used']:.0f} blocks used", complaints)


def check_log(soak: Soak) -> Check:
    lines = [line for line in soak.log.splitlines() if BROKEN.search(line)]
    return Check("log", f"{soak.log.count(chr(10))} lines", lines[:3])


def check_end(soak: Soak) -> Check:
    complaints = [] if soak.exit_code == 0 else [f"exit code {soak.exit_code} after SIGTERM"]
    complaints += [f"{soak.num_survivors} processes are left"] if soak.num_survivors else []
    return Check("end", f"exit code {soak.exit_code}", complaints)


def judge(soak: Soak) -> list[Check]:
    """All checks."""
    checks = (
        check_answers,
        check_repeats,
        check_coverage,
        check_blocks,
        check_leftovers,
        check_threads,
        check_presence,
        check_log,
        check_end,
    )
    return [*(check_memory(soak, module) for module in soak.base.processes), *(check(soak) for check in checks)]
