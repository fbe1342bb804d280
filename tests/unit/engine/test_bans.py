"""Tokens that may not come, over a batch with drafts, against a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.link.messages import FinishReason, GenerationRequest, SamplingParams
from engine.runner import StepResult
from engine.sampling.bans import Bans
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from tests.unit.engine.builders import make_batch, make_speculator
from tests.unit.engine.core_builders import assemble_core

VOCAB_SIZE = 12
EOS = 11
TOKENS = st.integers(0, VOCAB_SIZE - 1)


def make_request(
    prompt: list[int], *, stop: list[int] | None = None, banned: Any = (), **sampling: Any
) -> GenerationRequest:
    return GenerationRequest(
        request_id="any",
        prompt_token_ids=prompt,
        max_new_tokens=20,
        sampling=SamplingParams(**sampling),
        stop_token_ids=stop or [],
        banned_sequences=list(banned),
    )


def make_sequence(request: GenerationRequest, output: list[int]) -> Sequence:
    sequence = Sequence(request, arrival_time=0.0)
    sequence.token_ids += output
    sequence.num_computed_tokens = sequence.num_tokens - 1
    return sequence


def expected_bans(request: GenerationRequest, output: list[int]) -> set[int]:
    allowed = request.sampling.allowed_token_ids
    banned = set(range(VOCAB_SIZE)) - set(allowed) if allowed else set()
    if len(output) < request.sampling.min_tokens:
        banned |= {EOS, *request.stop_token_ids}
    for *before, last in request.banned_sequences:
        if not before or output[-len(before) :] == before:
            banned.add(last)
    return banned


REQUESTS = st.builds(
    make_request,
    st.lists(TOKENS, min_size=1, max_size=3),
    stop=st.lists(TOKENS, max_size=2),
    banned=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=4),
    min_tokens=st.integers(0, 4),
    allowed_token_ids=st.lists(TOKENS, max_size=4),
)


@given(
    st.lists(
        st.tuples(REQUESTS, st.lists(st.integers(0, 2), max_size=4), st.lists(st.integers(0, 2), max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_rows_are_those_of_a_loop(histories: list[tuple[GenerationRequest, list[int], list[int]]]) -> None:
    sequences = [make_sequence(request, output) for request, output, _ in histories]
    batch = make_batch(sequences, [1] * len(sequences), [draft for *_, draft in histories])
    logits = torch.randn(batch.num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    before, bans = logits.clone(), Bans([EOS])
    bans.apply(bans.select(batch), logits)
    row = 0
    for request, output, draft in histories:
        for length in range(len(draft) + 1):
            banned = expected_bans(request, output + draft[:length])
            assert {token for token in range(VOCAB_SIZE) if logits[row, token] == -torch.inf} == banned
            kept = [token for token in range(VOCAB_SIZE) if token not in banned]
            assert torch.equal(logits[row, kept], before[row, kept])
            row += 1


def test_who_bans_nothing_is_left_alone() -> None:
    """Also a sequence that was short and is not any longer."""
    sequences = [make_sequence(make_request([1]), [2]), make_sequence(make_request([1], min_tokens=2), [3, 4])]
    assert Bans.select(make_batch(sequences, [1, 1])) == []


def test_a_grammar_says_when_an_output_is_complete() -> None:
    sequence = make_sequence(make_request([1], min_tokens=5), [2])
    sequence.grammar = object()  # type: ignore[assignment]
    assert Bans.select(make_batch([sequence], [1])) == []


def test_tokens_are_needed_only_where_a_ban_depends_on_them() -> None:
    assert not Bans.needs_tokens(make_sequence(make_request([1], banned=[[4]], min_tokens=3, stop=[2]), []))
    assert Bans.needs_tokens(make_sequence(make_request([1], banned=[[4], [4, 5]]), []))


class Preferring:
    """A model that always likes tokens in the same order, the end first."""

    def execute(self, batch: ScheduledBatch) -> StepResult:
        row = torch.tensor([float(token) for token in range(VOCAB_SIZE)])
        return StepResult(row.repeat(batch.num_rows, 1))


def generate(request: GenerationRequest, num_drafts: int = 0) -> tuple[list[int], FinishReason | None]:
    scheduler = Scheduler(
        BlockManager(32, 4),
        max_batch_tokens=64,
        eos_token_ids=[EOS],
        drafter=make_speculator(num_drafts) if num_drafts else None,
    )
    core = assemble_core(scheduler, Preferring())
    core.take(request)
    events = []
    while core.has_work:
        events += core.step()
    assert all(event.error is None for event in events)
    return [token for event in events for token in event.token_ids], events[-1].finish_reason


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize(
    ("request_", "output", "reason"),
    [
        (make_request([1]), [EOS], FinishReason.EOS_TOKEN),
        (make_request([1], min_tokens=6), [10] * 6 + [EOS], FinishReason.EOS_TOKEN),
        (make_request([1], min_tokens=3, stop=[10]), [9] * 3 + [EOS], FinishReason.EOS_TOKEN),
        (make_request([1], stop=[9], banned=[[EOS], [10]]), [9], FinishReason.EOS_TOKEN),
        (make_request([1], banned=[[EOS], [10, 10]]), [10, 9] * 10, FinishReason.LENGTH),
        (make_request([1], allowed_token_ids=[3, 5]), [5] * 20, FinishReason.LENGTH),
        (make_request([1], allowed_token_ids=[3, EOS], min_tokens=2), [3, 3, EOS], FinishReason.EOS_TOKEN),
    ],
)
def test_what_a_model_says_then(
    request_: GenerationRequest, output: list[int], reason: FinishReason, num_drafts: int
) -> None:
    """With drafts, too: what was banned may be guessed, and is never taken."""
    assert generate(request_, num_drafts) == (output, reason)


def test_a_stop_token_ends_also_where_the_end_is_ignored() -> None:
    request = GenerationRequest(
        request_id="any", prompt_token_ids=[1], max_new_tokens=4, is_ignoring_eos=True, stop_token_ids=[EOS]
    )
    assert generate(request) == ([EOS], FinishReason.EOS_TOKEN)
