"""The CPU kernel against the reference implementation, on the same draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.link.messages import SamplingParams
from engine.sampling import sampler_torch
from engine.sampling.sampler import MAX_TEMPERATURE, RawRows
from engine.sampling.sampler_cpu import sample

CASES = {
    "greedy": {},
    "plain": {"seed": 1},
    "cold": {"seed": 1, "temperature": 0.05},
    "hot": {"seed": 1, "temperature": 20.0},
    "top_k 1": {"seed": 1, "top_k": 1},
    "top_k": {"seed": 1, "top_k": 40},
    "top_k of thousands": {"seed": 1, "top_k": 3000, "temperature": 20.0},
    "top_k above the vocabulary": {"seed": 1, "top_k": 10**6},
    "top_p": {"seed": 1, "top_p": 0.7},
    "tiny top_p": {"seed": 1, "top_p": 1e-6},
    "top_p beyond the first candidates": {"seed": 1, "top_p": 0.97, "temperature": 5.0},
    "top_p of nearly all": {"seed": 1, "top_p": 0.999, "temperature": 100.0},
    "top_p of thousands": {"seed": 1, "top_p": 0.9, "top_k": 3000, "temperature": 100.0},
    "all": {"seed": 1, "top_p": 0.9, "top_k": 30, "temperature": 0.7},
    "min_p": {"seed": 1, "min_p": 0.1},
    "typical_p": {"seed": 1, "typical_p": 0.6},
    "hot typical_p": {"seed": 1, "typical_p": 0.95, "temperature": 20.0},
    "filtered": {"seed": 1, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "is_logprob_filtered": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("vocab_size", [3, 8, 511, 513, 5001])
def test_kernel_draws_what_the_reference_draws(case: dict[str, Any], vocab_size: int) -> None:
    num_rows = 40
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 4
    params = [SamplingParams(**{**case, **({"seed": row} if "seed" in case else {})}) for row in range(num_rows)]
    positions = list(range(num_rows))
    kernel, reference = sample(logits, params, positions), sampler_torch.sample(logits, params, positions)
    # A number that falls within rounding of a token's boundary may go either way: at most one of forty.
    same = [row for row in range(num_rows) if kernel.token_ids[row] == reference.token_ids[row]]
    assert len(same) >= num_rows - 1
    torch.testing.assert_close(
        torch.tensor([kernel.logprobs[row] for row in same]),
        torch.tensor([reference.logprobs[row] for row in same]),
        atol=2e-5,
        rtol=1e-5,
    )
    assert all(kernel.is_finite)


def test_ties_at_the_thresholds_stay() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]).repeat(200, 1)
    params = [SamplingParams(seed=seed, top_k=1) for seed in range(200)]
    assert set(sample(logits, params, [0] * 200).token_ids) == {1, 2, 4}


def test_thousands_of_candidates_are_ordered_whatever_their_values() -> None:
    """Zeros of both signs, numbers next to zero, ties and what is ruled out; `top_k` is where each kind begins."""
    kinds = [5.0, 1e-44, 0.0, -0.0, -1e-44, -1e-30, -2.0, -3e38]
    logits = torch.tensor(kinds).repeat_interleave(700)[
        torch.randperm(5600, generator=torch.Generator().manual_seed(0))
    ]
    logits = torch.cat([logits, torch.full((300,), -torch.inf)]).expand(400, -1).contiguous()
    for top_k in range(600, 5600, 700):
        params = [SamplingParams(seed=row, top_k=top_k, temperature=MAX_TEMPERATURE) for row in range(400)]
        drawn = logits[0][sample(logits, params, [0] * 400).token_ids]
        assert drawn.min() == min(kinds[: top_k // 700 + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("seed", [None, 7])
def test_only_the_bad_row_is_flagged(bad: float, seed: int | None) -> None:
    logits = torch.randn(3, 700)
    logits[1, 650] = bad
    assert sample(logits, [SamplingParams(seed=seed)] * 3, [0] * 3).is_finite == [True, False, True]


def test_first_of_equal_best_logits_is_taken() -> None:
    logits = torch.zeros(1, 20)
    logits[0, [7, 13]] = 1.0
    assert sample(logits, [SamplingParams()], [0]).token_ids == [7]


@pytest.mark.parametrize("places", [(5, 700), (511, 512), (512, 1023, 1200), (0, 1200), (1199, 1200)])
def test_the_first_is_taken_in_whichever_chunk_the_others_are(places: tuple[int, ...]) -> None:
    logits = torch.randn(1, 1201, generator=torch.Generator().manual_seed(1))
    logits[0, list(places)] = 9.0
    assert sample(logits, [SamplingParams()], [0]).token_ids == [places[0]]


PARAMS = st.builds(
    SamplingParams,
    seed=st.none() | st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 5000]),
    top_p=st.sampled_from([1.0, 0.9, 0.2]),
    min_p=st.sampled_from([0.0, 0.02, 1.0]),
    typical_p=st.sampled_from([1.0, 0.95, 0.3]),
    num_top_tokens=st.sampled_from([0, 1, 5, 5000]),
    is_logprob_filtered=st.booleans(),
)


@given(
    params=st.lists(PARAMS, min_size=1, max_size=5),
    vocab_size=st.sampled_from([1, 8, 300, 1100]),
    seed=st.integers(0, 2**20),
    is_changed=st.booleans(),
)
@settings(max_examples=150)
def test_kernel_does_what_the_reference_does_with_any_parameters(
    params: list[SamplingParams], vocab_size: int, seed: int, is_changed: bool
) -> None:
    """Also with rows that were changed, some tokens ruled out. Rounding moves an edge too rarely to be seen here."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.randn(len(params), vocab_size, generator=generator) * 4
    logits, raw = model, None
    if is_changed:
        raw = RawRows.of(model, range(0, len(params), 2), params)
        logits = model.clone()
        logits[::2] += torch.randn(vocab_size, generator=generator)
        logits[::2, 1::3] = -torch.inf
    positions = list(range(len(params)))
    kernel, reference = sample(logits, params, positions, raw), sampler_torch.sample(logits, params, positions, raw)
    assert kernel.is_finite == reference.is_finite == [True] * len(params)
    assert kernel.token_ids == reference.token_ids
    assert kernel.logprobs == pytest.approx(reference.logprobs, abs=2e-5, rel=1e-5)
    for row, param in enumerate(params):
        if param.num_top_tokens:
            assert kernel.top_token_ids[row] == reference.top_token_ids[row]
            assert kernel.top_logprobs[row] == pytest.approx(reference.top_logprobs[row], abs=2e-5, rel=1e-5)
