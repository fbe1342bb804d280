"""Penalties, biases and the watermark over a batch, against a loop over tokens that counts everything anew."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.link.messages import AbortRequest, GenerationRequest, SamplingParams
from engine.runner import StepResult
from engine.sampling.penalties import WATERMARK_KEY, Penalties, TokenCounts
from engine.sampling.sampler import RawRows
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from tests.unit.engine.builders import make_batch, make_speculator
from tests.unit.engine.core_builders import assemble_core

VOCAB_SIZE = 20
GAMMA, DELTA = 0.3, 1.5

TOKENS = st.integers(0, VOCAB_SIZE - 1)
NUMBERS = st.sampled_from([0.0, -1.25, 0.5, 2.0])
PARAMS = st.builds(
    SamplingParams,
    is_watermarked=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    relative_frequency_penalty=NUMBERS,
    frequency_penalty=NUMBERS,
    presence_penalty=NUMBERS,
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, 0.25, 3.0]), max_size=4),
)


def make_sequence(prompt: list[int], output: list[int], params: SamplingParams) -> Sequence:
    request = GenerationRequest(request_id="any", prompt_token_ids=prompt, max_new_tokens=99, sampling=params)
    sequence = Sequence(request, arrival_time=0.0)
    sequence.token_ids += output
    sequence.num_computed_tokens = sequence.num_tokens - 1
    return sequence


def expected_row(row: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    """One row, token by token, in the order of `docs/wire.md`, 5.1."""
    row = list(row)
    if params.is_watermarked:
        generator = torch.Generator().manual_seed(15485863 * (prompt + output)[-1])
        for token in torch.randperm(VOCAB_SIZE, generator=generator).tolist()[: int(VOCAB_SIZE * GAMMA)]:
            row[token] += DELTA
    for token, count in Counter(prompt + output).items():
        row[token] *= params.repetition_penalty if row[token] < 0 else 1 / params.repetition_penalty
        row[token] -= params.relative_frequency_penalty * count / len(prompt + output)
    for token, count in Counter(output).items():
        row[token] -= params.frequency_penalty * count
        row[token] -= params.presence_penalty
    for token, bias in params.logit_bias.items():
        row[token] += bias
    return row


def apply(penalties: Penalties, batch: ScheduledBatch, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits before and after."""
    logits = torch.randn(batch.num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    penalties.apply(penalties.select(batch), logits)
    return before, logits


@given(
    histories=st.lists(
        st.tuples(
            st.lists(TOKENS, min_size=1, max_size=9),
            st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=3), st.lists(TOKENS, max_size=3)), max_size=3),
            PARAMS,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_rows_are_those_of_a_loop_that_counts_anew(histories: list[tuple[list[int], Any, SamplingParams]]) -> None:
    """Sequences grow by a few tokens between steps, and each step has drafts that may come true or not."""
    penalties = Penalties(GAMMA, DELTA)
    sequences = [make_sequence(prompt, [], params) for prompt, _, params in histories]
    for step in range(4):
        drafts: list[list[int]] = []
        for sequence, (_, steps, _) in zip(sequences, histories, strict=True):
            new_tokens, draft = steps[step - 1] if 0 < step <= len(steps) else ([], [])
            sequence.token_ids += new_tokens
            sequence.num_computed_tokens = sequence.num_tokens - 1
            drafts.append(list(draft))
        batch = make_batch(sequences, [1] * len(sequences), drafts)
        before, after = apply(penalties, batch, seed=step)
        row = 0
        for sequence, draft in zip(sequences, drafts, strict=True):
            prompt = sequence.request.prompt_token_ids
            for length in range(len(draft) + 1):
                output = sequence.token_ids[len(prompt) :] + draft[:length]
                expected = expected_row(before[row].tolist(), prompt, output, sequence.request.sampling)
                torch.testing.assert_close(after[row], torch.tensor(expected), atol=1e-5, rtol=1e-5)
                row += 1


@given(sequences=st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=9), PARAMS), min_size=2, max_size=5))
def test_a_row_has_the_same_bits_alone_and_in_company(sequences: list[tuple[list[int], SamplingParams]]) -> None:
    made = [make_sequence(prompt[:1], prompt[1:], params) for prompt, params in sequences]
    before, together = apply(Penalties(), make_batch(made, [1] * len(made)))
    for row, sequence in enumerate(made):
        alone = before[row : row + 1].clone()
        Penalties().apply(Penalties.select(make_batch([sequence], [1])), alone)
        assert torch.equal(alone[0], together[row])


def test_only_sequences_that_get_a_token_have_rows() -> None:
    chunk = make_sequence([1, 2, 3], [], SamplingParams(repetition_penalty=2.0))
    chunk.num_computed_tokens = 0
    plain = make_sequence([1], [2], SamplingParams())
    wanting = make_sequence([4], [4], SamplingParams(presence_penalty=1.0))
    batch = make_batch([chunk, plain, wanting], [2, 1, 1], [[], [5], [6]])
    assert [row for scheduled in Penalties.select(batch) for row in scheduled.rows] == [2, 3]
    before, after = apply(Penalties(), batch)
    assert torch.equal(before[:2], after[:2])
    assert (before != after).nonzero().tolist() == [[2, 4], [3, 4], [3, 6]]


@pytest.mark.parametrize("previous", [0, 7, 19])
def test_the_watermark_is_seeded_by_the_token_before_the_row(previous: int) -> None:
    """TGI's rule, on ids that do not come from here: torch's generator is the same in both."""
    sequence = make_sequence([3], [previous], SamplingParams(is_watermarked=True))
    before, after = apply(Penalties(0.5, 2.0), make_batch([sequence], [1], [[11]]))
    for row, token in enumerate((previous, 11)):
        permutation = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(WATERMARK_KEY * token))
        is_green = torch.zeros(VOCAB_SIZE).index_fill(0, permutation[:10], 2.0)
        torch.testing.assert_close(after[row] - before[row], is_green, atol=1e-5, rtol=0)


class CountedBias(dict[int, float]):
    """Counts how often it is gone through."""

    num_reads = 0

    def values(self) -> Any:
        type(self).num_reads += 1
        return super().values()

    def items(self) -> Any:
        type(self).num_reads += 1
        return super().items()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_biases_of_a_request_are_gone_through_once(penalty: float) -> None:
    """Tens of thousands are milliseconds a row, in a step that everybody shares."""
    CountedBias.num_reads = 0
    bias = CountedBias(dict.fromkeys(reversed(range(VOCAB_SIZE)), 0.5))
    sequence = make_sequence([1], [2], SamplingParams(logit_bias=bias, repetition_penalty=penalty))
    penalties = Penalties()
    for _ in range(3):
        before, after = apply(penalties, make_batch([sequence], [1], [[4]]))
        for row, output in enumerate(([2], [2, 4])):
            expected = expected_row(before[row].tolist(), [1], output, sequence.request.sampling)
            torch.testing.assert_close(after[row], torch.tensor(expected))
        CountedBias.num_reads -= 2  # those of the expected rows
    assert CountedBias.num_reads == 1


def test_counts_go_back_to_what_they_were() -> None:
    counts = TokenCounts([5, 3, 5])
    counts.add(3)
    before = [column.tolist() for column in counts.columns()]
    assert before == [[3, 5], [2, 2], [1, 0]]
    for token in (9, 5, 9):
        counts.add(token)
    assert [column.tolist() for column in counts.columns()] == [[3, 5, 9], [2, 3, 2], [1, 1, 2]]
    assert counts.num_tokens == 7
    for token in (9, 5, 9):
        counts.remove(token)
    assert [column.tolist() for column in counts.columns()] == before
    assert counts.num_tokens == 4


def test_raw_rows_are_copied_only_where_they_are_wanted() -> None:
    logits = torch.arange(12.0).reshape(3, 4)
    own, filtered = SamplingParams(), SamplingParams(is_logprob_filtered=True)
    assert RawRows.of(logits, [], [own] * 3) is None
    assert RawRows.of(logits, [1], [own, filtered, own]) is None
    raw = RawRows.of(logits, [2, 1, 0], [own, filtered, own])
    assert raw is not None
    logits += 1
    assert raw.rows == [0, 2]
    assert raw.logits.tolist() == [[0.0, 1.0, 2.0, 3.0], [8.0, 9.0, 10.0, 11.0]]


class RepeatingRunner:
    """Token 5 is by far the likeliest, then 6, then 8 and so on (7 is the end)."""

    def execute(self, batch: ScheduledBatch) -> StepResult:
        row = torch.full((VOCAB_SIZE,), -50.0)
        row[[5, 6, 8, 9, 10, 11]] = torch.tensor([20.0, 19.0, 18.0, 17.0, 16.0, 15.0])
        return StepResult(row.repeat(batch.num_rows, 1), [])


def make_core(penalties: Penalties | None = None, *, max_draft_tokens: int = 0, num_blocks: int = 16) -> EngineCore:
    scheduler = Scheduler(
        BlockManager(num_blocks, 2),
        max_batch_tokens=32,
        eos_token_ids=[7],
        drafter=make_speculator(max_draft_tokens) if max_draft_tokens else None,
    )
    return assemble_core(scheduler, RepeatingRunner(), penalties=penalties)


def request(name: str, max_new_tokens: int, **params: Any) -> GenerationRequest:
    sampling = SamplingParams(**params)
    return GenerationRequest(request_id=name, prompt_token_ids=[1, 2], max_new_tokens=max_new_tokens, sampling=sampling)


@pytest.mark.parametrize("max_draft_tokens", [0, 3])
def test_counts_live_as_long_as_their_sequence(max_draft_tokens: int) -> None:
    """Through preemption; and they are gone after an end, an abort and a failure."""
    penalties = Penalties()
    core = make_core(penalties, max_draft_tokens=max_draft_tokens)
    core.take(request("ends", 6, presence_penalty=1.5))
    core.take(request("aborted", 9, repetition_penalty=1.2))
    core.take(request("fails", 9, frequency_penalty=1.0))
    core.take(request("plain", 9))
    token_ids = [token for event in core.step() if event.request_id == "ends" for token in event.token_ids]
    assert len(penalties._counts) == 3
    core.scheduler.preempt(next(s for s in core.scheduler.running if s.request.request_id == "ends"))
    gc.collect()
    assert len(penalties._counts) == 3
    core.take(AbortRequest("aborted"))
    assert len(penalties._counts) == 2
    while len(token_ids) < 6:
        token_ids += [token for event in core.step() if event.request_id == "ends" for token in event.token_ids]
    assert token_ids == expected_repeats(6)
    core.scheduler.fail_all("boom")
    assert len(penalties._counts) == 0


def expected_repeats(size: int) -> list[int]:
    """What greedy choice makes of the runner's row under a presence penalty of 1.5."""
    output: list[int] = []
    row = RepeatingRunner().execute(make_batch([make_sequence([1], [], SamplingParams())], [1])).logits[0].tolist()
    for _ in range(size):
        adjusted = expected_row(row, [1, 2], output, SamplingParams(presence_penalty=1.5))
        output.append(adjusted.index(max(adjusted)))
    return output


def test_logprobs_are_of_the_raw_logits_unless_filtered() -> None:
    core = make_core()
    core.take(request("raw", 1, logit_bias={8: 30.0}, num_top_tokens=1))
    core.take(request("filtered", 1, logit_bias={8: 30.0}, num_top_tokens=1, is_logprob_filtered=True))
    raw, filtered = core.step()
    assert raw.token_ids == filtered.token_ids == [8]
    own = torch.tensor([20.0, 19.0, 18.0, 17.0, 16.0, 15.0]).log_softmax(dim=0)
    assert raw.logprobs == pytest.approx([own[2].item()], abs=1e-5)
    assert (raw.top_token_ids, filtered.top_token_ids) == ([[5]], [[8]])
    assert raw.top_logprobs[0] == pytest.approx([own[0].item()], abs=1e-5)
    assert filtered.logprobs == filtered.top_logprobs[0] == pytest.approx([0.0], abs=1e-5)
