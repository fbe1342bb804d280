"""How much of prompts a step has room for."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.sequence import Sequence
from engine.scheduling.step_limit import MIN_PROMPT_SHARE, MIN_PROMPT_TOKENS, StepLimit, TimeRoom
from engine.scheduling.step_times import Chunk, StepTimes, StepWork
from tests.unit.engine.builders import make_batch, make_request

MANY = 10**6


def decoding(num_tokens: int) -> Sequence:
    return Sequence(make_request("a", [1] * num_tokens), arrival_time=0.0)


def calibrated(limit_s: float | None, alone_limit_s: float | None) -> StepLimit:
    """A token takes a millisecond, reading the weights 20 ms."""
    limit = StepLimit(limit_s, alone_limit_s)
    limit.calibrate(100, few_s=0.02, many_s=0.1)
    return limit


def num_fitting(limit: StepLimit, *, is_only_sequence: bool = False) -> int:
    room = limit.room(is_only_sequence=is_only_sequence)
    room.begin([], [])
    return room.num_fitting(MANY, 0, 1.0)


def test_nothing_is_limited_before_anything_is_known() -> None:
    assert num_fitting(StepLimit(1.0, 5.0)) == MANY


def test_no_limit_on_devices_whose_steps_are_short() -> None:
    assert num_fitting(calibrated(None, None)) == MANY
    assert num_fitting(calibrated(None, None), is_only_sequence=True) == MANY


def test_a_request_that_is_alone_may_take_longer() -> None:
    limit = calibrated(0.25, 5.0)
    assert 200 < num_fitting(limit) < 250
    assert 1500 < num_fitting(limit, is_only_sequence=True) < 5000


def test_the_summary_tells_the_target() -> None:
    assert StepLimit(None, 5.0).describe() is None
    assert str(StepLimit(0.25, 5.0).describe()).endswith(" take 0.25 s at most (target between two tokens)")
    sparing = str(StepLimit(0.25, 5.0, spares_streams=True).describe())
    assert " 0.25 s at most, and 4 times what they take without prompts; while few prompts wait 2.5 times, " in sparing
    assert ", or 0.065 s if that is longer (" in sparing


@pytest.mark.parametrize(("limit_s", "alone_limit_s"), [(0.25, 5.0), (0.25, None), (None, 0.25)])
def test_the_limit_learns_from_what_steps_took(limit_s: float | None, alone_limit_s: float | None) -> None:
    limit, is_only = calibrated(limit_s, alone_limit_s), limit_s is None
    before = num_fitting(limit, is_only_sequence=is_only)
    sequence = Sequence(make_request("a", [1] * 100), arrival_time=0.0)
    for _ in range(20):
        limit.observe(make_batch([sequence], [100]), 0.2)
    assert num_fitting(limit, is_only_sequence=is_only) == pytest.approx(before / 2, rel=0.1)


SECONDS = st.floats(1e-4, 2.0)
TIMES = st.builds(
    lambda few_s, more_s: StepTimes(64, few_s, few_s + more_s), few_s=SECONDS, more_s=st.floats(0.0, 10.0)
)
PARTS = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 30_000), st.sampled_from([0.5, 1.0])), max_size=6)
CHUNKS = st.lists(st.builds(Chunk, st.integers(1, 5000), st.integers(0, 30_000)), max_size=4)


@given(
    times=TIMES,
    limit_s=SECONDS,
    spares_streams=st.booleans(),
    missing=CHUNKS,
    contexts=st.lists(st.integers(1, 3000), max_size=5),
    parts=PARTS,
)
def test_no_step_is_planned_beyond_its_limit(
    times: StepTimes,
    limit_s: float,
    spares_streams: bool,
    missing: list[Chunk],
    contexts: list[int],
    parts: list[tuple[int, int, float]],
) -> None:
    """But for tokens that are always granted, and a part of the time that decoding alone takes."""
    room = TimeRoom(times, limit_s, spares_streams=spares_streams)
    room.begin([decoding(context) for context in contexts], missing)
    work = StepWork(len(contexts), len(contexts), 0, sum(contexts))
    decodes_s = times.seconds(work)
    if contexts and spares_streams:
        limit_s = sparing_limit_s(limit_s, decodes_s, seconds_of(times, missing) if missing else None)
    max_s = max(limit_s, (1 + MIN_PROMPT_SHARE) * decodes_s)
    num_taken = 0
    for num_tokens, context, share in parts:
        count = room.num_fitting(num_tokens, context, share)
        assert 0 <= count <= num_tokens
        assert count or num_taken, "the first one gets something"
        room.take(count, context)
        num_taken += count
        work = work.with_chunk(count, context)
        if num_taken > MIN_PROMPT_TOKENS and count:
            assert times.seconds(work) <= max_s * (1 + 1e-9)


@given(times=TIMES, limit_s=SECONDS, context=st.integers(0, 30_000))
def test_the_room_is_used(times: StepTimes, limit_s: float, context: int) -> None:
    room = TimeRoom(times, limit_s)
    room.begin([], [])
    count = room.num_fitting(MANY, context, 1.0)
    assert count == MANY or times.seconds(StepWork().with_chunk(count + 1, context)) > limit_s


def seconds_of(times: StepTimes, missing: list[Chunk]) -> float:
    """The time of a step that computes all that prompts lack."""
    return times.seconds(functools.reduce(lambda work, chunk: work.with_chunk(*chunk), missing, StepWork()))


def sparing_limit_s(limit_s: float, decodes_s: float, waiting_s: float | None) -> float:
    """The longest step of streams that take `decodes_s`, beside prompts that wait and will take `waiting_s`, if any."""
    factor = 4.0 if waiting_s is None or waiting_s > 3 else 2.5 if waiting_s < 1.5 else 1 + waiting_s
    return min(limit_s, 4 * decodes_s, max(0.065, factor * decodes_s))


@given(
    times=TIMES,
    limit_s=SECONDS,
    missing=CHUNKS,
    contexts=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
)
def test_prompts_get_all_that_streams_are_to_spare_them(
    times: StepTimes, limit_s: float, missing: list[Chunk], contexts: list[int]
) -> None:
    work = StepWork(len(contexts), len(contexts), 0, sum(contexts))
    room = TimeRoom(times, limit_s, spares_streams=True)
    room.begin([decoding(context) for context in contexts], missing)
    count = room.num_fitting(MANY, 0, 1.0)
    waiting_s = seconds_of(times, missing) if missing else None
    longest_s = sparing_limit_s(limit_s, times.seconds(work), waiting_s)
    assert count == MANY or times.seconds(work.with_chunk(count + 1, 0)) > longest_s


def test_prompts_get_more_of_a_step_the_more_of_them_wait() -> None:
    limit = StepLimit(0.5, 5.0, spares_streams=True)
    limit.calibrate(100, few_s=0.02, many_s=0.1)
    counts = []
    for num_prompts in (1, 13, 18, 40, 400, 0):  # each takes a tenth of a second
        room = limit.room(is_only_sequence=False)
        room.begin([decoding(100) for _ in range(60)], itertools.repeat(Chunk(100, 0), num_prompts))
        counts.append(room.num_fitting(MANY, 0, 1.0))
    assert counts[0] == counts[1] < counts[2] < counts[3] == counts[4]
    assert counts[5] == counts[4], "drafts, as no prompt is there"


def test_only_as_many_prompts_are_looked_at_as_the_room_depends_on() -> None:
    room = TimeRoom(StepTimes(100, few_s=0.02, many_s=0.1), 0.5, spares_streams=True)
    room.begin([decoding(100)], itertools.repeat(Chunk(100, 0)))  # they never end
    assert room.num_fitting(MANY, 0, 1.0)


def test_drafts_of_a_request_that_is_alone_spare_nobody() -> None:
    limit = StepLimit(0.25, 1.0, spares_streams=True)
    limit.calibrate(100, few_s=0.02, many_s=0.1)
    counts = []
    for is_only_sequence in (True, False):
        room = limit.room(is_only_sequence=is_only_sequence)
        room.begin([decoding(100)], [])
        counts.append(room.num_fitting(MANY, 0, 1.0))
    assert counts[0] > 10 * counts[1]


def test_without_streams_prompts_have_all_the_time() -> None:
    sparing = StepLimit(0.25, 5.0, spares_streams=True)
    sparing.calibrate(100, few_s=0.02, many_s=0.1)
    assert num_fitting(sparing) == num_fitting(calibrated(0.25, 5.0))


def test_a_prompt_far_into_its_context_gets_fewer_tokens() -> None:
    room = calibrated(0.25, 5.0).room(is_only_sequence=False)
    room.begin([], [])
    assert room.num_fitting(MANY, 30_000, 1.0) < room.num_fitting(MANY, 0, 1.0) / 3


def test_prompts_get_on_where_decoding_alone_takes_longer_than_the_limit() -> None:
    room = calibrated(0.01, None).room(is_only_sequence=False)
    room.begin([decoding(1000) for _ in range(400)], [])
    room.take(room.num_fitting(MANY, 0, 1.0), 0)
    assert room.num_fitting(MANY, 0, 1.0) == 0


def test_prompts_get_on_where_reading_the_weights_alone_takes_longer_than_the_limit() -> None:
    limit = StepLimit(0.25, 1.0)
    limit.calibrate(64, few_s=4.0, many_s=4.5)
    for is_only_sequence in (False, True):
        assert num_fitting(limit, is_only_sequence=is_only_sequence) > MIN_PROMPT_TOKENS
