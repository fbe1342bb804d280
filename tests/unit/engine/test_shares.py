"""How prompts share steps: nobody waits long behind a long one, and nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling import shares
from engine.scheduling.sequence import Sequence
from engine.scheduling.shares import MAX_LOOKED_AT, missing_chunks
from engine.scheduling.step_limit import MIN_PROMPT_SHARE, MIN_PROMPT_TOKENS, TimeRoom
from engine.scheduling.step_times import StepTimes, work_of
from tests.unit.engine.builders import EOS, Simulation, ids_of, make_request, scheduled_counts

MAX_TOKENS = 20
"""Room of a step for prompts."""


def make_simulation(*, num_blocks: int = 2000, max_batch_tokens: int = 1000) -> Simulation:
    simulation = Simulation(num_blocks=num_blocks, max_batch_tokens=max_batch_tokens)
    simulation.model = lambda token_ids: len(token_ids) % EOS
    return simulation


def prompt_of(size: int, number: int) -> list[int]:
    """Tokens that no prompt of another number below 100 starts with."""
    return [number, *(index % 200 for index in range(size - 1))]


def first_tokens(simulation: Simulation, max_tokens: int = MAX_TOKENS) -> list[str]:
    """The ids in the order of their first tokens; those of one step in the order of their arrival."""
    order: list[str] = []
    while simulation.scheduler.has_work:
        simulation.step(max_tokens)
        order += [name for name, events in simulation.events.items() if events and name not in order]
    return order


def test_prompts_of_about_the_same_length_are_served_in_order() -> None:
    simulation = make_simulation()
    sizes = [70, 64, 72, 40, 70]
    for number, size in enumerate(sizes):
        simulation.add(f"r{number}", prompt_of(size, number), max_new_tokens=1)
    assert scheduled_counts(simulation.step(MAX_TOKENS)) == {"r0": MAX_TOKENS}
    assert first_tokens(simulation) == ["r0", "r1", "r2", "r3", "r4"]


def test_a_short_prompt_passes_a_long_one_that_keeps_half_of_the_step() -> None:
    simulation = make_simulation()
    simulation.add("long", prompt_of(200, 1), max_new_tokens=1)
    simulation.step(MAX_TOKENS)
    simulation.add("short", prompt_of(15, 2), max_new_tokens=1)
    assert scheduled_counts(simulation.step(MAX_TOKENS)) == {"long": 10, "short": 10}
    assert scheduled_counts(simulation.step(MAX_TOKENS)) == {"long": 15, "short": 5}


def test_the_shortest_pass_first_and_those_before_them_keep_their_places() -> None:
    simulation = make_simulation()
    for number, size in enumerate([400, 300, 30, 12]):
        simulation.add(f"r{number}", prompt_of(size, number), max_new_tokens=1)
    assert scheduled_counts(simulation.step(MAX_TOKENS)) == {"r0": 10, "r3": 10}
    assert ids_of(simulation.scheduler.running) == ["r0", "r1", "r2", "r3"]
    assert scheduled_counts(simulation.step(MAX_TOKENS)) == {"r0": 10, "r3": 2, "r2": 8}
    assert first_tokens(simulation) == ["r3", "r2", "r0", "r1"]


def test_who_was_passed_waits_until_a_step_computes_something_of_it() -> None:
    """Its time in the queue goes on, and it finds the prefix that somebody computed meanwhile."""
    simulation = make_simulation()
    simulation.add("first", prompt_of(100, 1), max_new_tokens=1)
    simulation.add("same", prompt_of(100, 1), max_new_tokens=1)
    simulation.add("short", prompt_of(5, 2), max_new_tokens=1)
    simulation.step(MAX_TOKENS)
    same = simulation.scheduler.running[1]
    assert ids_of([same]) == ["same"]
    assert (same.queue_time_s, same.num_computed_tokens) == (None, 0)
    first_tokens(simulation)  # the last step of "first" has room for the beginning of "same"
    assert simulation.events["same"][0].num_cached_tokens == 92
    assert simulation.scheduler.stats().num_prefix_hit_tokens == 92


def test_a_prompt_with_a_known_prefix_is_as_short_as_what_it_lacks() -> None:
    simulation = make_simulation()
    simulation.add("turn", prompt_of(300, 1), max_new_tokens=1)
    simulation.drain()
    simulation.add("long", prompt_of(200, 2), max_new_tokens=1)
    simulation.add("next turn", prompt_of(310, 1), max_new_tokens=1)
    assert scheduled_counts(simulation.step(MAX_TOKENS)) == {"long": 10, "next turn": 10}


def test_nobody_passes_one_for_whom_there_is_no_memory() -> None:
    simulation = make_simulation(num_blocks=40)
    simulation.add("long", prompt_of(100, 1), max_new_tokens=1)  # 25 blocks
    simulation.add("large", prompt_of(80, 2), max_new_tokens=1)  # 20 blocks
    simulation.add("short", prompt_of(5, 3), max_new_tokens=1)
    assert scheduled_counts(simulation.step(MAX_TOKENS)) == {"long": MAX_TOKENS}
    assert ids_of(list(simulation.scheduler.waiting)) == ["large", "short"]


SIZES = st.integers(1, 150)
ARRIVALS = st.lists(st.tuples(st.integers(0, 6), SIZES), min_size=1, max_size=25)


@given(arrivals=ARRIVALS, max_tokens=st.integers(2, 40))
@settings(max_examples=60)
def test_every_prompt_is_finished_within_its_bound(arrivals: list[tuple[int, int]], max_tokens: int) -> None:
    """Whatever comes after it: the oldest prompt has half of each step, so older ones take twice their own time.

    And however long those before it are: half of each step is for those that are much shorter.
    """
    check_bounds(arrivals, max_tokens)


def check_bounds(arrivals: list[tuple[int, int]], max_tokens: int) -> None:
    simulation = make_simulation()
    ahead: dict[str, int] = {}
    for number, (pause, size) in enumerate(arrivals):
        for _ in range(pause):
            step_within_bounds(simulation, ahead, max_tokens)
        name = f"r{number}"
        # All before it, and itself, at half a step each; a last step of each may be filled in part.
        ahead[name] = sum(-(-left // half_of(max_tokens)) + 1 for left in [size, *lacking(simulation)])
        simulation.add(name, prompt_of(size, number), max_new_tokens=1)
    while simulation.scheduler.has_work:
        step_within_bounds(simulation, ahead, max_tokens)


def half_of(max_tokens: int) -> int:
    """Half of a step, but for the last token of a prompt that the step before had no room for: it comes first."""
    return max_tokens // 2


def lacking(simulation: Simulation) -> list[int]:
    return [sequence.num_uncomputed_tokens for sequence in simulation.live_sequences]


def step_within_bounds(simulation: Simulation, ahead: dict[str, int], max_tokens: int) -> None:
    oldest = simulation.live_sequences[:1]
    before = [sequence.num_uncomputed_tokens for sequence in oldest]
    batch = simulation.step(max_tokens)
    counts = scheduled_counts(batch)
    for name, size in zip(ids_of(oldest), before, strict=True):
        assert counts.get(name, 0) >= min(size, half_of(max_tokens)), "half of the step is the oldest prompt's"
    assert sum(counts.values()) == min(max_tokens, sum(counts.values()) + sum(lacking(simulation)))
    for name in [name for name, events in simulation.events.items() if not events]:
        ahead[name] -= 1
        assert ahead[name] >= 0, f"{name} waits too long"


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_bounds_see_a_long_prompt_that_is_passed_too_often(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(shares, "OLDEST_SHARE", share)
    with pytest.raises(AssertionError, match="half of the step|waits too long"):
        check_bounds([(0, 150), *[(1, 30)] * 20], max_tokens=20)


@given(long_sizes=st.lists(st.integers(200, 600), min_size=1, max_size=3), short_size=st.integers(1, 40))
@settings(max_examples=30)
def test_a_short_prompt_behind_long_ones_finishes_in_a_few_steps(long_sizes: list[int], short_size: int) -> None:
    simulation = make_simulation()
    for number, size in enumerate(long_sizes):
        simulation.add(f"long {number}", prompt_of(size, number), max_new_tokens=1)
    simulation.step(MAX_TOKENS)
    simulation.add("short", prompt_of(short_size, 9), max_new_tokens=1)
    num_steps = 0
    while not simulation.events["short"]:
        simulation.step(MAX_TOKENS)
        num_steps += 1
    assert num_steps <= -(-2 * short_size // MAX_TOKENS)


@given(
    arrivals=st.lists(st.tuples(st.integers(0, 3), SIZES, st.integers(1, 20)), min_size=1, max_size=12),
    few_s=st.floats(0.001, 0.1),
    many_s=st.floats(0.1, 2.0),
    spares_streams=st.booleans(),
)
@settings(max_examples=60)
def test_no_step_is_planned_beyond_the_target(
    arrivals: list[tuple[int, int, int]], few_s: float, many_s: float, spares_streams: bool
) -> None:
    """But for a few tokens of a prompt, or for half as much again as decoding alone takes."""
    limit_s, times = 0.25, StepTimes(64, few_s, many_s)
    simulation = make_simulation(num_blocks=4000)

    def step() -> None:
        batch = simulation.scheduler.schedule(TimeRoom(times, limit_s, spares_streams=spares_streams))
        decodes = [s for s in batch.scheduled if s.num_tokens == 1 and s.num_computed_tokens]
        work = work_of(batch)
        num_prompt_tokens = batch.num_tokens - len(decodes)
        if num_prompt_tokens > MIN_PROMPT_TOKENS:
            alone = work._replace(num_tokens=len(decodes), num_rows=len(decodes), num_prompt_pairs=0)
            # Rows of prompts that end with the step are not foreseen.
            planned = work._replace(num_rows=len(decodes))
            alone_s = times.seconds(alone)
            longest_s = min(limit_s, 4 * alone_s) if spares_streams and decodes else limit_s
            max_s = max(longest_s, (1 + MIN_PROMPT_SHARE) * alone_s)
            assert times.seconds(planned) <= max_s + 1e-9
        simulation.finish(batch)

    for number, (pause, size, num_new) in enumerate(arrivals):
        for _ in range(pause):
            if simulation.scheduler.has_work:
                step()
        simulation.add(f"r{number}", prompt_of(size, number), max_new_tokens=num_new)
    while simulation.scheduler.has_work:
        step()


def test_a_step_looks_at_the_first_of_those_that_wait() -> None:
    """Each costs a look at the prefix cache."""
    looks: list[Sequence] = []

    def num_findable(sequence: Sequence) -> int:
        looks.append(sequence)
        return 4

    waiting = [Sequence(make_request(f"r{number}", [1] * 10), arrival_time=0.0) for number in range(100)]
    assert list(missing_chunks([], waiting, num_findable)) == [(6, 4)] * MAX_LOOKED_AT
    assert looks == waiting[:MAX_LOOKED_AT]


def test_a_step_of_many_tokens_admits_no_more_than_can_run() -> None:
    simulation = make_simulation(max_batch_tokens=3)
    for number, size in enumerate([50, 40, 30, 2, 1]):
        simulation.add(f"r{number}", prompt_of(size, number), max_new_tokens=2)
    assert scheduled_counts(simulation.step(2)) == {"r0": 2}  # the short ones stand behind two that can't run
    assert ids_of(simulation.scheduler.running) == ["r0", "r1", "r2"]
    simulation.drain()
    assert all(len(simulation.output(name)) == 2 for name in simulation.requests)
