"""Seconds of steps, learnt from steps."""

from __future__ import annotations

import math
import random

import pytest

from engine.scheduling.sequence import Sequence
from engine.scheduling.step_times import StepTimes, StepWork, prompt_pairs, work_of
from tests.unit.engine.builders import make_batch, make_request

MACHINES = [(0.047, 7e-3, 3.5e-3, 1e-6, 3.4e-6), (0.02, 1.5e-3, 1e-3, 1.2e-6, 3.3e-6), (0.3, 7e-2, 1e-2, 3e-6, 3e-6)]
"""Seconds of reading the weights, then the rates of `StepWork`: the first two as measured, one core, 16 and 8 bits."""


MEASURED = {
    "bfloat16": """1 256 0 0 47.1, 4 256 0 0 50.2, 16 256 0 0 174.3, 64 256 0 0 701.0, 4 4096 0 0 104.8,
        1 16000 0 0 100.0, 16 1024 0 0 219.2, 0 1 8 0 74.9, 0 1 16 0 131.9, 0 1 32 0 236.9, 0 1 64 0 443.1,
        0 1 256 0 1726.2, 0 1 32 1024 254.8, 0 1 32 4096 367.6, 0 1 32 16000 788.6""",
    "int8": """1 256 0 0 19.6, 4 256 0 0 26.2, 16 256 0 0 57.2, 64 256 0 0 182.3, 4 4096 0 0 77.4, 1 16000 0 0 64.6,
        16 1024 0 0 92.3, 0 1 8 0 24.9, 0 1 16 0 32.6, 0 1 32 0 49.4, 0 1 64 0 94.0, 0 1 256 0 372.9,
        0 1 32 1024 83.1, 0 1 32 4096 202.5, 0 1 32 16000 678.7, 0 1 128 4096 704.7, 4 256 32 0 56.8,
        16 256 32 2048 151.3""",
}
"""Steps of the demo model on one core (AMD EPYC, Zen 4, thread time): decoding sequences, tokens of each, tokens of a
chunk, tokens before it, milliseconds."""


def measured_steps(name: str) -> list[tuple[StepWork, float]]:
    steps = []
    for text in MEASURED[name].split(","):
        num_sequences, num_tokens, count, context, ms = map(float, text.split())
        work = decode(int(num_sequences), int(num_tokens)).with_chunk(int(count), int(context))
        steps.append((work._replace(num_rows=int(num_sequences) + (count > 0)), ms / 1000))
    return steps


@pytest.mark.parametrize("name", MEASURED)
def test_measured_steps_are_learnt(name: str) -> None:
    steps, draw = measured_steps(name), random.Random(0)
    times = StepTimes(
        64, steps[0][1], next(seconds for work, seconds in steps if work.num_prompt_pairs == 64 * 65 // 2)
    )
    for _ in range(10):
        for work, seconds in draw.sample(steps, len(steps)):
            times.observe(work, seconds)
    for work, seconds in steps:
        assert times.seconds(work) == pytest.approx(seconds, rel=0.2)


def true_seconds(machine: tuple[float, ...], work: StepWork) -> float:
    read_s, *rates = machine
    tokens_s, rows_s, *pairs_s = (rate * count for rate, count in zip(rates, work, strict=True))
    return math.hypot(read_s, tokens_s + rows_s) + sum(pairs_s)


def chunk(num_tokens: int, context: int) -> StepWork:
    return StepWork(num_tokens, 0, prompt_pairs(num_tokens, context))


def decode(num_sequences: int, context: int) -> StepWork:
    return StepWork(num_sequences, num_sequences, 0, num_sequences * context)


def started(machine: tuple[float, ...]) -> StepTimes:
    return StepTimes(64, true_seconds(machine, decode(1, 64)), true_seconds(machine, chunk(64, 0)))


@pytest.mark.parametrize("machine", MACHINES)
def test_each_chunk_of_a_long_prompt_is_predicted_from_those_before(machine: tuple[float, ...]) -> None:
    times = started(machine)
    for context in range(0, 32_768, 64):
        work = chunk(64, context)
        assert times.seconds(work) == pytest.approx(true_seconds(machine, work), rel=0.2)
        times.observe(work, true_seconds(machine, work))


@pytest.mark.parametrize("machine", MACHINES)
def test_after_a_mixed_load_all_steps_are_predicted(machine: tuple[float, ...]) -> None:
    times, draw = started(machine), random.Random(0)
    works = [chunk(draw.randint(16, 400), draw.randint(0, 30_000)) for _ in range(200)]
    works += [decode(draw.randint(1, 64), draw.randint(1, 8_000)) for _ in range(200)]
    works += [
        StepWork(*(a + b for a, b in zip(first, second, strict=True)))
        for first, second in zip(works[:200], works[200:], strict=True)
    ]
    draw.shuffle(works)
    for work in works:
        times.observe(work, true_seconds(machine, work) * draw.uniform(0.9, 1.1))
    errors = [abs(times.seconds(work) / true_seconds(machine, work) - 1) for work in works]
    assert sorted(errors)[int(0.9 * len(errors))] < 0.2


def test_one_disturbed_step_changes_little() -> None:
    times = started(MACHINES[0])
    before = times.seconds(chunk(64, 0))
    times.observe(chunk(64, 0), 100.0)
    assert times.seconds(chunk(64, 0)) < 1.4 * before


def test_rates_follow_a_machine_that_gets_slower() -> None:
    times, slower = started(MACHINES[0]), tuple(3 * rate for rate in MACHINES[0])
    for _ in range(20):
        for work in (chunk(64, 2_000), decode(8, 1_000), decode(1, 100)):
            times.observe(work, true_seconds(slower, work))
    for work in (chunk(64, 2_000), decode(8, 1_000), decode(1, 100)):
        assert times.seconds(work) == pytest.approx(true_seconds(slower, work), rel=0.2)


def test_work_counts_what_each_token_attends_to() -> None:
    prompt = Sequence(make_request("prompt", [1] * 10), arrival_time=0.0, num_computed_tokens=4)
    single = Sequence(make_request("single", [1] * 8), arrival_time=0.0, num_computed_tokens=7)
    drafting = Sequence(make_request("drafting", [1] * 3), arrival_time=0.0, num_computed_tokens=2)
    batch = make_batch([single, drafting, prompt], [1, 1, 2], [[], [5, 5], []])
    assert work_of(batch) == StepWork(6, 4, (5 + 6) + (3 + 4 + 5), 8)
