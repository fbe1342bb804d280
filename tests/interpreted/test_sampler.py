"""Sampling and masks in Triton against the torch reference; results that nobody wrote would be NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.device import find_interpreted
from engine.link.messages import GenerationRequest, SamplingParams
from engine.sampling import sampler_torch, sampler_triton
from engine.sampling.grammar import num_words
from engine.sampling.grammar_torch import apply_masks as apply_masks_in_torch
from engine.sampling.grammar_triton import apply_masks
from engine.sampling.sampler import RawRows
from engine.sampling.sampler_triton import ChosenRows, make_specs, sample, word_of
from engine.scheduling.batch import SampledBatch
from tests.contract.harness import make_core, make_runner, random_ids, run_requests
from tests.interpreted.test_engine import PLAIN

PART, TILE = 32, 64
"""Small ones, so that small vocabularies have many."""
GREEDY = SamplingParams()
NEARLY = 3e-6
"""Float32 sums may place a bound one token away from where it is if they come as near to the edge."""


@pytest.fixture(autouse=True, scope="module")
def small_poisoned_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_triton, "PART", PART)
        patch.setattr(sampler_triton, "TILE", TILE)
        patch.setattr(sampler_triton, "LIST_TILE", TILE)
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one sampled row."""

    token_id: int
    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]
    is_finite: bool = True

    def is_close_to(self, other: Row) -> bool:
        numbers, others = ([row.logprob, *row.top_logprobs] for row in (self, other))
        ids, other_ids = ([row.token_id, *row.top_token_ids] for row in (self, other))
        return ids == other_ids and numbers == pytest.approx(others, rel=1e-6, abs=1e-6)


def rows_of(batch: SampledBatch) -> list[Row]:
    count = len(batch.token_ids)
    tops, logprobs = batch.top_token_ids or [[]] * count, batch.top_logprobs or [[]] * count
    return [Row(*row) for row in zip(batch.token_ids, batch.logprobs, tops, logprobs, batch.is_finite, strict=True)]


def moved(param: SamplingParams, by: float) -> SamplingParams:
    """The parameters with all bounds a little higher or lower."""
    return SamplingParams(
        seed=param.seed,
        temperature=param.temperature,
        top_k=param.top_k,
        top_p=param.top_p if param.top_p == 1.0 else param.top_p * (1 + by),
        min_p=param.min_p * (1 - abs(by)),
        typical_p=param.typical_p if param.typical_p == 1.0 else param.typical_p * (1 + by),
        num_top_tokens=param.num_top_tokens,
        is_logprob_filtered=param.is_logprob_filtered,
    )


def check(
    logits: torch.Tensor, params: list[SamplingParams], positions: list[int], raw: RawRows | None = None
) -> list[Row]:
    """Each row is the reference's in float32 or float64, or, where that is on an edge, the one beside the edge."""
    before = logits.clone()
    result = rows_of(sample(logits, params, positions, raw))
    assert torch.equal(logits, before)
    wide = raw and RawRows(raw.rows, raw.logits.double())
    expected = [
        rows_of(sampler_torch.sample(logits.double(), params, positions, wide)),
        rows_of(sampler_torch.sample(logits, params, positions, raw)),
    ]
    for index, row in enumerate(result):
        if any(row.is_close_to(rows[index]) for rows in expected):
            continue
        for by in (-NEARLY, NEARLY):
            beside = [moved(param, by) for param in params]
            expected.append(rows_of(sampler_torch.sample(logits.double(), beside, positions, wide)))
        assert any(row.is_close_to(rows[index]) for rows in expected), (row, [rows[index] for rows in expected])
    return result


def random_logits(rows: int, size: int, *, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


@st.composite
def parameters(draw: st.DrawFn) -> SamplingParams:
    if draw(st.integers(0, 4)) == 0:
        return SamplingParams(num_top_tokens=draw(st.sampled_from([0, 1, 4])))
    return SamplingParams(
        seed=draw(st.integers(0, 2**64 - 1)),
        temperature=draw(st.sampled_from([1e-46, 0.3, 1.0, 1.0, 1.7, 9.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 60, 10**10])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.4, 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.01, 0.4, 1.0])),
        typical_p=draw(st.sampled_from([1.0, 1.0, 0.95, 0.3])),
        num_top_tokens=draw(st.sampled_from([0, 0, 1, 4, 70])),
        is_logprob_filtered=draw(st.booleans()),
    )


@given(
    size=st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 128, 129, 300, 1500]),
    params=st.lists(parameters(), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
    masked=st.sampled_from([0.0, 0.0, 0.7]),
    is_raw_kept=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_rows_with_any_parameters(
    size: int, params: list[SamplingParams], seed: int, spread: float, masked: float, is_raw_kept: bool
) -> None:
    """Vocabularies around the edges of parts and tiles, some masked as by a grammar, with and without raw logits."""
    raw_logits = random_logits(len(params), size, seed=seed, spread=spread)
    refused = torch.rand(raw_logits.shape, generator=torch.Generator().manual_seed(seed)) < masked
    refused[:, seed % size] = False
    logits = raw_logits.masked_fill(refused, -torch.inf)
    raw = RawRows.of(raw_logits, range(0, len(params), 2), params) if is_raw_kept else None
    for row in check(logits, params, list(range(seed, seed + len(params))), raw):
        assert row.is_finite


def test_a_large_vocabulary() -> None:
    everything = SamplingParams(seed=1, top_k=900, top_p=0.9, min_p=1e-4, typical_p=0.9, num_top_tokens=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_triton, "TILE", 4096)
        patch.setattr(sampler_triton, "LIST_TILE", 2048)
        patch.setattr(sampler_triton, "PART", 4096)
        check(random_logits(3, 9001), [GREEDY, SamplingParams(seed=5), everything], [0, 1, 2])


def test_the_first_of_equals_wins() -> None:
    logits = torch.zeros(3, 200)
    logits[0, [40, 70, 199]] = 3.0
    logits[1, [199, 31]] = 1.0
    assert [row.token_id for row in check(logits, [GREEDY] * 3, [0] * 3)] == [40, 31, 0]


def test_ties_with_a_bound_stay() -> None:
    logits = torch.zeros(4, 150)
    logits[:, ::3] = 2.0
    params = [
        SamplingParams(seed=seed, top_k=3, top_p=top_p, is_logprob_filtered=True)
        for seed in (1, 2)
        for top_p in (1, 0.1)
    ]
    for row in check(logits, params, [0] * 4):
        assert row.token_id % 3 == 0
        assert row.logprob == pytest.approx(-np.log(50), abs=1e-6)


def test_more_ties_than_places_are_listed_again() -> None:
    logits = torch.zeros(2, 150)
    logits[0, 9] = 1.0
    rows = check(logits, [SamplingParams(num_top_tokens=1), SamplingParams(num_top_tokens=2)], [0, 0])
    assert rows[0].top_token_ids == [9]
    assert rows[1].top_token_ids == list(range(150))


def test_draws_on_the_way_through_a_row() -> None:
    """Every token is drawn by some number, and which one is the reference's, also at the edges of tiles."""
    logits = random_logits(1, 130, spread=0.5).expand(40, -1).contiguous()
    rows = check(logits, [SamplingParams(seed=seed) for seed in range(40)], [seed % 3 for seed in range(40)])
    assert len({row.token_id for row in rows}) > 25


BAD = {"nan": torch.nan, "infinity": torch.inf}


@pytest.mark.parametrize("place", [0, 63, 99])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_row_is_flagged_and_no_other_notices(value: float, place: int) -> None:
    everything = SamplingParams(seed=5, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.9, num_top_tokens=3)
    params = [GREEDY, GREEDY, SamplingParams(seed=5, is_logprob_filtered=True), everything, everything]
    logits = random_logits(5, 100)
    expected = rows_of(sample(logits, params, [0] * 5))
    logits[1:4, place] = value
    logits[2, place] = -value
    raw = RawRows.of(random_logits(5, 100), [3], params)
    result = rows_of(sample(logits, params, [0] * 5, raw))
    is_ruled_out = value == torch.inf  # -inf is a token that is not allowed
    assert [row.is_finite for row in result] == [True, False, is_ruled_out, False, True]
    assert (result[0], result[4]) == (expected[0], expected[4])


@pytest.mark.parametrize("seed", [None, 1])
def test_a_row_in_which_nothing_is_allowed_is_flagged(seed: int | None) -> None:
    params = [SamplingParams(seed=seed)]
    raw = RawRows.of(random_logits(1, 70), [0], params)
    assert not rows_of(sample(torch.full((1, 70), -torch.inf), params, [0], raw))[0].is_finite
    assert not rows_of(sample(torch.full((1, 70), -torch.inf), params, [0]))[0].is_finite


def test_a_row_has_the_same_bits_beside_any_others() -> None:
    logits = random_logits(4, 333)
    params = [
        GREEDY,
        SamplingParams(seed=1, top_p=0.9, num_top_tokens=4),
        SamplingParams(seed=2, top_k=9, is_logprob_filtered=True),
        SamplingParams(num_top_tokens=2),
    ]
    together = rows_of(sample(logits, params, [4, 5, 6, 7]))
    for order in ([2], [3, 1], [0, 0], [1]):
        rows = rows_of(sample(logits[order], [params[row] for row in order], [4 + row for row in order]))
        assert rows == [together[row] for row in order]


def test_no_rows() -> None:
    assert sample(torch.empty(0, 10), [], []) == SampledBatch([], [], [])


@pytest.mark.parametrize(
    ("param", "has_raw", "launches"),
    [
        (GREEDY, False, ["part_kernel", "choose_kernel"]),
        (SamplingParams(seed=1, top_p=0.5, num_top_tokens=1), False, ["part_kernel", "choose_kernel", "list_kernel"]),
        (SamplingParams(seed=1), True, ["part_kernel", "part_kernel", "choose_kernel"]),
    ],
    ids=["greedy", "top tokens", "raw rows"],
)
def test_launches_of_a_step_read_nothing(
    param: SamplingParams, has_raw: bool, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no numbers behind fake tensors: a read would be an error."""
    params, recorded = [param] * 6, []
    monkeypatch.setattr(sampler_triton, "launch", lambda kernel, *_, **__: recorded.append(kernel.fn.__name__))
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(6, 1000, device="cuda:0")
        raw = RawRows([0, 3], torch.empty(2, 1000, device="cuda:0")) if has_raw else None
        capacity = 13 if param.num_top_tokens else 0
        ChosenRows.launch(logits, make_specs(params, [0] * 6, raw), raw, capacity)
    assert recorded == launches


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1023, 1024, 1025, 3000])
def test_masks(vocab_size: int) -> None:
    chance = np.random.default_rng(vocab_size)
    masks = chance.integers(-(2**31), 2**31, (4, num_words(vocab_size)), np.int32)
    masks[1], masks[2] = -1, 0
    rows = np.array([0, 2, 3, 5], np.int32)
    logits = torch.from_numpy(chance.standard_normal((7, vocab_size), np.float32))
    logits[4] = torch.nan
    expected, result = logits.clone(), logits.clone()
    apply_masks_in_torch(expected, rows, masks)
    apply_masks(result, rows, masks)
    np.testing.assert_array_equal(result.numpy(), expected.numpy())


def make_requests() -> list[GenerationRequest]:
    """Greedy, seeded with every filter, held to a grammar, and with a penalty."""
    params = [
        GREEDY,
        SamplingParams(seed=7, num_top_tokens=2),
        SamplingParams(seed=8, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.95),
        SamplingParams(seed=9, temperature=1.4, is_logprob_filtered=True),
        SamplingParams(seed=10, repetition_penalty=1.3, logit_bias={7: 2.0}, num_top_tokens=1),
    ]
    return [
        GenerationRequest(
            request_id=f"r{number}",
            prompt_token_ids=random_ids(3 + number, number),
            max_new_tokens=3,
            is_ignoring_eos=number != 3,
            sampling=param,
            grammar="start: /[a-z]+/" if number == 3 else None,
        )
        for number, param in enumerate(params)
    ]


@pytest.mark.long
def test_an_engine_samples_as_on_a_cpu(tiny_model_dir: Path) -> None:
    device = find_interpreted(0)
    assert device is not None
    runner = make_runner(tiny_model_dir, device=device)
    result = run_requests(
        make_core(tiny_model_dir, runner=runner, sample=sample, apply_masks=apply_masks), make_requests()
    )
    expected = run_requests(
        make_core(tiny_model_dir, runner=make_runner(tiny_model_dir, device=PLAIN)), make_requests()
    )
    assert result.token_ids == expected.token_ids
    for logprobs, others in zip(result.logprobs, expected.logprobs, strict=True):
        assert logprobs == pytest.approx(others, abs=1e-4)
    assert [[ids for ids, _ in top] for top in result.top_tokens] == [
        [ids for ids, _ in top] for top in expected.top_tokens
    ]


def test_a_field_is_found_behind_wider_ones() -> None:
    record = np.dtype([("wide", np.float64), ("narrow", np.int32), ("token", np.int32)])
    assert np.ones(1, record).view(np.int32).size == 4
    assert [word_of(record, name) for name in ("wide", "narrow", "token")] == [0, 2, 3]
