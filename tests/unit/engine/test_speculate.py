"""Which drafts are made: what the look-up finds, what a step costs, and when a draft pays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.ngram import propose_ngram
from engine.scheduling.proposal import MAX_MATCH, IntArray, Proposal
from engine.scheduling.sequence import Sequence
from engine.scheduling.speculate import Acceptance, Speculator
from engine.scheduling.step_costs import StepCosts
from tests.unit.engine.builders import make_request


def tokens(*ids: int) -> IntArray:
    return np.array(ids, np.int32)


def by_hand(token_ids: list[int], max_tokens: int) -> Proposal:
    """The rule in other words: the longest end that occurs earlier, its latest place, and what follows there."""
    size = len(token_ids)
    for length in range(min(MAX_MATCH, size - 1), 0, -1):
        for end in range(size - 1, length - 1, -1):
            if token_ids[end - length : end] == token_ids[size - length :]:
                text = list(token_ids)
                while len(text) < size + max_tokens:
                    text.append(text[len(text) - (size - end)])
                return Proposal(text[size:], length)
    return Proposal([], 0)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 9))
def test_the_look_up_finds_what_the_rule_says(token_ids: list[int], max_tokens: int) -> None:
    expected = by_hand(token_ids, max_tokens) if max_tokens and len(token_ids) > 1 else Proposal([], 0)
    assert propose_ngram(tokens(*token_ids), max_tokens) == expected


@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "expected"),
    [
        ([5, 6, 7, 8, 9, 6, 7], 2, Proposal([8, 9], 2)),
        ([1, 2, 1, 2], 5, Proposal([1, 2, 1, 2, 1], 2)),
        ([1, 9, 2, 9, 3, 9], 1, Proposal([3], 1)),
        ([4, 4, 4], 3, Proposal([4, 4, 4], 2)),
        ([1, 2, 3], 4, Proposal([], 0)),
        ([1], 4, Proposal([], 0)),
    ],
)
def test_examples(token_ids: list[int], max_tokens: int, expected: Proposal) -> None:
    assert propose_ngram(tokens(*token_ids), max_tokens) == expected


def test_costs_are_interpolated_and_carried_on() -> None:
    costs = StepCosts({1: 10.0, 2: 11.0, 4: 15.0, 8: 16.0})
    assert [costs.seconds(rows) for rows in (1, 2, 3, 4, 6, 8, 12)] == [10.0, 11.0, 13.0, 15.0, 15.5, 16.0, 17.0]


def test_costs_follow_what_is_seen() -> None:
    costs = StepCosts({1: 10.0, 4: 12.0})
    for _ in range(300):  # contexts have grown: all steps take twice as long
        costs.observe(1, 20.0)
        costs.observe(4, 24.0)
    assert costs.seconds(4) / costs.seconds(1) == pytest.approx(1.2, abs=0.01)
    for _ in range(600):  # four rows have become dearer than one
        costs.observe(1, 20.0)
        costs.observe(4, 48.0)
    assert costs.seconds(4) / costs.seconds(1) == pytest.approx(2.4, abs=0.15)


def test_tiles_of_rows_are_learnt_soon() -> None:
    """As measured: rows are computed in pairs, so that 17 cost as much as 18, and no more than 24 whatever happens."""
    costs = StepCosts({1: 36.0, 16: 114.0, 24: 149.0})
    for _ in range(4):
        costs.observe(16, 114.0)
        costs.observe(17, 125.0)
        costs.observe(18, 125.0)
    assert costs.seconds(17) > 122.0
    costs.observe(20, 900.0)  # disturbed
    assert costs.seconds(20) <= 149.0


def test_a_count_seen_alone_does_not_become_dearer_than_the_others() -> None:
    costs = StepCosts({1: 10.0, 4: 12.0})
    for _ in range(300):
        costs.observe(1, 30.0)
    assert costs.seconds(4) / costs.seconds(1) == pytest.approx(1.2, abs=0.08)


def test_one_disturbed_step_changes_little() -> None:
    costs = StepCosts({1: 10.0, 4: 12.0})
    costs.observe(4, 5000.0)
    assert costs.seconds(4) < 13.0


def test_two_counts_at_least_must_be_known() -> None:
    with pytest.raises(ValueError, match="two row counts"):
        StepCosts({1: 1.0})


def test_acceptance_grows_with_the_match_and_with_what_is_seen() -> None:
    acceptance = Acceptance()
    rates = [acceptance.rate(length) for length in range(1, MAX_MATCH + 5)]
    assert rates == sorted(rates)
    before = acceptance.rate(3)
    for _ in range(100):
        acceptance.observe(3, is_accepted=False)
    assert acceptance.rate(3) < before / 5
    assert acceptance.rate(4) == rates[3]


LINEAR = {1: 1.0, 64: 64.0}
FLAT = {1: 1.0, 64: 1.0}
BOUND_BY_MEMORY = {1: 1.0, 4: 1.1, 8: 1.6, 64: 10.0}


def make_sequences(count: int, prompt: list[int] | None = None) -> list[Sequence]:
    prompt = prompt or [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6]
    return [Sequence(make_request(f"r{index}", prompt, 100), arrival_time=0.0) for index in range(count)]


def draft(speculator: Speculator, sequences: list[Sequence], room: int = 50, budget: int = 1000) -> list[list[int]]:
    return speculator.draft(sequences, [room] * len(sequences), budget)


def test_rows_that_cost_nothing_are_filled() -> None:
    assert draft(Speculator(propose_ngram, StepCosts(FLAT), 4), make_sequences(2)) == [[7, 8, 1, 2]] * 2


def test_rows_that_cost_as_much_as_tokens_are_not() -> None:
    assert draft(Speculator(propose_ngram, StepCosts(LINEAR), 4), make_sequences(2)) == [[], []]


def test_room_and_budget_are_kept() -> None:
    speculator = Speculator(propose_ngram, StepCosts(FLAT), 8)
    assert draft(speculator, make_sequences(1), room=2) == [[7, 8]]
    assert draft(speculator, make_sequences(1), room=0) == [[]]
    assert sum(map(len, draft(speculator, make_sequences(3), budget=5))) == 5


def test_a_big_batch_drafts_nothing_where_one_sequence_does() -> None:
    speculator = Speculator(propose_ngram, StepCosts(BOUND_BY_MEMORY), 8)
    assert len(draft(speculator, make_sequences(1))[0]) >= 3
    assert not any(draft(speculator, make_sequences(32)))


def on_inputs(speculator: Speculator, sequence: Sequence, *, is_right: bool, steps: int) -> list[int]:
    """How long the drafts are over some steps in which all proposals are right, or all wrong."""
    lengths = []
    for _ in range(steps):
        (drafted,) = draft(speculator, [sequence])
        proposed = speculator._drafting[sequence].proposal.token_ids
        assert proposed, "nothing is learnt without a proposal"
        new = [*drafted, proposed[len(drafted) % len(proposed)]] if is_right else [proposed[0] + 1000]
        speculator.observe(sequence, drafted, new)
        sequence.token_ids += [1, 2, 3, 4, 5, 6]  # some end that is found again
        lengths.append(len(drafted))
    return lengths


def test_a_request_whose_drafts_are_wrong_stops_drafting_and_one_whose_are_right_begins_again() -> None:
    speculator = Speculator(propose_ngram, StepCosts(BOUND_BY_MEMORY), 8)
    (sequence,) = make_sequences(1)
    wrong = on_inputs(speculator, sequence, is_right=False, steps=60)
    assert wrong[0] > 0
    assert wrong[-10:] == [0] * 10
    right = on_inputs(speculator, sequence, is_right=True, steps=60)
    assert right[-1] > 0, "proposals that were not used were seen to be right"


def test_counts_and_forgetting() -> None:
    speculator = Speculator(propose_ngram, StepCosts(FLAT), 4)
    (sequence,) = make_sequences(1)
    (drafted,) = draft(speculator, [sequence])
    speculator.observe(sequence, drafted, [7, 8, 0])
    assert (speculator.num_drafts, speculator.num_drafted, speculator.num_accepted) == (1, 4, 2)
    speculator.observe(sequence, [], [5])
    assert (speculator.num_drafts, speculator.num_drafted, speculator.num_accepted) == (1, 4, 2)
    speculator.forget(sequence)
    assert not speculator._drafting


@given(st.data())
def test_drafts_are_beginnings_of_proposals_within_all_limits(data: Any) -> None:
    speculator = Speculator(propose_ngram, StepCosts(data.draw(st.sampled_from([FLAT, BOUND_BY_MEMORY]))), 6)
    prompts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=5))
    sequences = [make_sequences(1, prompt)[0] for prompt in prompts]
    rooms = [data.draw(st.integers(0, 8)) for _ in prompts]
    budget = data.draw(st.integers(0, 20))
    drafts = speculator.draft(sequences, rooms, budget)
    assert sum(map(len, drafts)) <= budget
    for drafted, room, prompt in zip(drafts, rooms, prompts, strict=True):
        assert len(drafted) <= min(room, 6)
        assert drafted == by_hand(prompt, 6).token_ids[: len(drafted)]
