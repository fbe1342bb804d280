"""All samplers against plain oracles: sort, add up, cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import MinPLogitsWarper, TypicalLogitsWarper

from engine.link.messages import SamplingParams
from engine.link.registry import import_entry
from engine.sampling import sampler_torch
from engine.sampling.sampler import SAMPLERS, RawRows, Sample, uniform
from engine.sampling.sampler_torch import filter_logits
from tests.contract.oracles import backends_here

GREEDY = SamplingParams()
MANY_TOKENS = 1024


@pytest.fixture(params=backends_here(SAMPLERS))
def sample(request: pytest.FixtureRequest) -> Sample:
    chosen: Sample = import_entry(SAMPLERS, request.param, "sampler")
    return chosen


def random_logits(rows: int, vocab_size: int, *, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def kept_tokens(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().squeeze(1).tolist()) for row in logits]


def nucleus(logits: torch.Tensor, top_p: float) -> set[int]:
    """The smallest set of best tokens whose mass reaches top_p, in float64; ties with the last one stay."""
    probabilities = logits.double().softmax(dim=-1).tolist()
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    mass = 0.0
    for last in order:
        mass += probabilities[last]
        if mass >= top_p:
            break
    return {token for token in order if logits[token] >= logits[last]}


def test_greedy_takes_the_largest_and_the_first_of_equals(sample: Sample) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, -1.0, 5.0, 0.0]])
    result = sample(logits, [GREEDY, GREEDY], [0, 7])
    assert result.token_ids == [1, 0]
    assert result.is_finite == [True, True]
    expected = logits.log_softmax(dim=-1)
    assert result.logprobs == pytest.approx([expected[0, 1].item(), expected[1, 0].item()], abs=1e-6)


def test_greedy_ignores_the_other_parameters(sample: Sample) -> None:
    logits = random_logits(1, 50)
    result = sample(logits, [SamplingParams(temperature=9.0, top_k=3, top_p=0.1)], [0])
    assert result.logprobs[0] == pytest.approx(logits.log_softmax(dim=-1).max().item(), abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3, 20, 49, 50, 1000])
def test_top_k_keeps_the_best(top_k: int) -> None:
    logits = random_logits(3, 50)
    kept = kept_tokens(filter_logits(logits, [SamplingParams(seed=0, top_k=top_k)] * 3))
    for row, tokens in zip(logits, kept, strict=True):
        assert tokens == set(row.topk(min(top_k, 50)).indices.tolist())


def test_top_k_keeps_ties_with_the_last() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept_tokens(filter_logits(logits, [SamplingParams(seed=0, top_k=2)])) == [{1, 2, 3, 4}]


def test_each_row_has_its_own_parameters() -> None:
    logits = random_logits(5, 300)
    params = [
        SamplingParams(seed=0),
        SamplingParams(seed=0, top_k=4),
        SamplingParams(seed=0, top_p=0.5),
        SamplingParams(seed=0, top_k=5, top_p=0.9),
        SamplingParams(seed=0, temperature=0.5, top_k=7),
    ]
    together = filter_logits(logits, params)
    for row, param in enumerate(params):
        assert torch.equal(together[row : row + 1], filter_logits(logits[row : row + 1], [param]))
    assert [len(tokens) for tokens in kept_tokens(together)[:2]] == [300, 4]


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0])
def test_top_p_against_a_sort(top_p: float, spread: float) -> None:
    logits = random_logits(4, 3 * MANY_TOKENS, spread=spread, seed=3)
    kept = kept_tokens(filter_logits(logits, [SamplingParams(seed=0, top_p=top_p)] * 4))
    for row, tokens in zip(logits, kept, strict=True):
        # float32 sums may place the edge one token away from the exact one
        assert len(tokens ^ nucleus(row, top_p)) <= 1
    if spread == 0.05 and top_p >= 0.5:
        assert all(len(tokens) > MANY_TOKENS for tokens in kept), "flat distributions keep many"


def test_top_p_of_rows_with_and_without_mass_in_the_candidates() -> None:
    sharp, flat = random_logits(1, 5000, spread=8.0), random_logits(1, 5000, spread=0.01)
    param = SamplingParams(seed=0, top_p=0.9)
    together = filter_logits(torch.cat([sharp, flat]), [param, param])
    assert torch.equal(together[:1], filter_logits(sharp, [param]))
    assert torch.equal(together[1:], filter_logits(flat, [param]))


def test_top_p_keeps_ties_with_the_last_and_always_one() -> None:
    logits = torch.tensor([[0.0, 5.0, 3.0, 3.0]])
    assert kept_tokens(filter_logits(logits, [SamplingParams(seed=0, top_p=0.9)])) == [{1, 2, 3}]
    assert kept_tokens(filter_logits(logits, [SamplingParams(seed=0, top_p=1e-9)])) == [{1}]


def test_top_p_is_of_what_temperature_and_top_k_left() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    # after top_k=2 the best has 0.73 of the mass, before it 0.64
    params = SamplingParams(seed=0, top_k=2, top_p=0.7)
    assert kept_tokens(filter_logits(logits, [params])) == [{0}]
    # at temperature 0.5 the best has 0.86 of four, at 1 it has 0.64
    assert kept_tokens(filter_logits(logits, [SamplingParams(seed=0, temperature=0.5, top_p=0.8)])) == [{0}]
    assert kept_tokens(filter_logits(logits, [SamplingParams(seed=0, top_p=0.8)])) == [{0, 1}]


@pytest.mark.parametrize("temperature", [3.4e38, math.inf])
@pytest.mark.parametrize("filters", [{}, {"min_p": 0.5}, {"top_k": 3}, {"typical_p": 0.9}])
def test_the_largest_temperatures_draw_any_token_that_may_come(
    sample: Sample, temperature: float, filters: dict[str, Any]
) -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf, 0.5]]).repeat(64, 1)
    params = [SamplingParams(seed=seed, temperature=temperature, **filters) for seed in range(64)]
    result = sample(logits, params, [0] * 64)
    assert all(result.is_finite)
    assert 2 not in result.token_ids
    assert len(set(result.token_ids)) > 1


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_min_p_is_that_of_transformers(min_p: float, temperature: float) -> None:
    logits = random_logits(6, 300)
    params = SamplingParams(seed=0, min_p=min_p, temperature=temperature)
    expected = MinPLogitsWarper(min_p)(torch.zeros(6, 1, dtype=torch.int64), logits / temperature)  # type: ignore[arg-type]
    assert kept_tokens(filter_logits(logits, [params] * 6)) == kept_tokens(expected)


@pytest.mark.parametrize("typical_p", [0.01, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_typical_p_is_that_of_transformers(typical_p: float, spread: float) -> None:
    logits = random_logits(6, 300, spread=spread)
    expected = TypicalLogitsWarper(typical_p)(torch.zeros(6, 1, dtype=torch.int64), logits)  # type: ignore[arg-type]
    kept = kept_tokens(filter_logits(logits, [SamplingParams(seed=0, typical_p=typical_p)] * 6))
    for tokens, of_row in zip(kept, kept_tokens(expected), strict=True):
        assert len(tokens ^ of_row) <= 1  # float32 sums may place the edge one token away


def test_typical_p_may_leave_the_best_token_out() -> None:
    """0.4, and twelve of 0.05: the entropy is 2.16, -log 0.4 is 0.92 and -log 0.05 is 3.00."""
    logits = torch.tensor([[0.4] + [0.05] * 12]).log()
    assert kept_tokens(filter_logits(logits, [SamplingParams(seed=0, typical_p=0.5)])) == [set(range(1, 13))]


def test_filters_work_on_what_the_ones_before_have_left() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    # top-p leaves two tokens, whose entropy is 0.60: the better one (0.34 from it) alone has 0.71 of the mass
    assert kept_tokens(filter_logits(logits, [SamplingParams(seed=0, top_p=0.7, typical_p=0.7)])) == [{0}]
    # of all five it is 1.33: the second and the third are nearer
    assert kept_tokens(filter_logits(logits, [SamplingParams(seed=0, typical_p=0.3)])) == [{1, 2}]
    # min-p leaves three
    params = SamplingParams(seed=0, top_k=4, min_p=0.25, typical_p=0.99)
    assert kept_tokens(filter_logits(logits, [params])) == [{0, 1, 2}]


def test_filtering_leaves_the_models_logits_alone(sample: Sample) -> None:
    logits = random_logits(2, 40)
    before = logits.clone()
    sample(logits, [SamplingParams(seed=1, temperature=0.5, top_k=3, top_p=0.5), GREEDY], [0, 0])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 3},
        {"top_k": 70},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_k": 9, "top_p": 0.9, "temperature": 0.8},
        {"top_p": 0.99, "temperature": 9.0},
        {"min_p": 0.2},
        {"typical_p": 0.4},
        {"top_k": 20, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.8, "temperature": 1.2},
    ],
    ids=str,
)
def test_what_is_drawn_is_allowed_and_all_of_it_is_drawn(sample: Sample, params: dict[str, Any]) -> None:
    size = 4000
    logits = random_logits(1, 40, spread=1.0)
    (allowed,) = kept_tokens(filter_logits(logits, [SamplingParams(seed=0, **params)]))
    drawn = sample(
        logits.expand(size, -1).contiguous(), [SamplingParams(seed=n, **params) for n in range(size)], [0] * size
    )
    assert set(drawn.token_ids) <= allowed
    probabilities = filter_logits(logits, [SamplingParams(seed=0, **params)]).softmax(dim=-1)[0]
    assert {token for token in allowed if probabilities[token] > 10 / size} <= set(drawn.token_ids)


def test_filtered_logprobs_are_those_of_the_filtered_distribution(sample: Sample) -> None:
    logits = random_logits(3, 64)
    params = [
        SamplingParams(seed=1, temperature=0.7, top_k=5, top_p=0.9, is_logprob_filtered=True),
        GREEDY,
        SamplingParams(seed=2, temperature=1.5, is_logprob_filtered=True),
    ]
    result = sample(logits, params, [0, 0, 0])
    filtered = logits.clone()
    filtered[[0, 2]] = filter_logits(logits[[0, 2]], [params[0], params[2]])
    expected = filtered.log_softmax(dim=-1)
    for row, token in enumerate(result.token_ids):
        assert result.logprobs[row] == pytest.approx(expected[row, token].item(), abs=1e-5)
        assert math.isfinite(result.logprobs[row])


def test_plain_logprobs_are_those_of_the_model(sample: Sample) -> None:
    logits = random_logits(3, 64)
    params = [
        SamplingParams(seed=1, temperature=0.7, top_k=5, top_p=0.9, num_top_tokens=6),
        SamplingParams(seed=2, temperature=1.5, typical_p=0.4),
        SamplingParams(seed=3, num_top_tokens=2),
    ]
    result = sample(logits, params, [0, 0, 0])
    expected = logits.log_softmax(dim=-1)
    for row, token in enumerate(result.token_ids):
        assert result.logprobs[row] == pytest.approx(expected[row, token].item(), abs=1e-5)
        best = expected[row].topk(params[row].num_top_tokens)
        assert result.top_token_ids[row] == best.indices.tolist()
        assert result.top_logprobs[row] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_top_tokens_have_ties_with_the_last_and_never_what_is_ruled_out(sample: Sample) -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 2.0, -torch.inf, 2.0], [1.0, 4.0, 2.0, 2.0, -torch.inf, 2.0]])
    wide = [SamplingParams(num_top_tokens=2), SamplingParams(num_top_tokens=99)]
    assert sample(logits, wide, [0, 0]).top_token_ids == [[1, 2, 3, 5], [1, 2, 3, 5, 0]]
    filtered = {"seed": 1, "is_logprob_filtered": True, "num_top_tokens": 4}
    result = sample(logits, [SamplingParams(**filtered, top_k=k) for k in (1, 3)], [0, 0])  # type: ignore[arg-type]
    assert result.top_token_ids == [[1], [1, 2, 3, 5]]
    assert result.top_logprobs[0] == [0.0]
    none = sample(logits, [SamplingParams(num_top_tokens=1), GREEDY], [0, 0])
    assert (none.top_token_ids, len(none.top_logprobs[0])) == ([[1], []], 1)


def test_rows_that_were_changed_report_what_they_were(sample: Sample) -> None:
    """The choice is of the changed logits, logprobs and top tokens are of the raw ones, unless filtered."""
    raw = random_logits(4, 64)
    changed = raw.clone()
    changed[1:, 7] += 50.0
    changed[1:, :7] = -torch.inf
    params = [
        SamplingParams(num_top_tokens=1),
        SamplingParams(num_top_tokens=1),
        SamplingParams(num_top_tokens=1, is_logprob_filtered=True),
        SamplingParams(num_top_tokens=1, seed=3, temperature=0.8, top_k=4),
    ]
    result = sample(changed, params, [0] * 4, RawRows.of(raw, [1, 2, 3], params))
    expected = raw.log_softmax(dim=-1)
    assert result.token_ids == [int(raw[0].argmax()), 7, 7, 7]
    for row in (0, 1, 3):
        assert result.logprobs[row] == pytest.approx(expected[row, result.token_ids[row]].item(), abs=1e-5)
        assert result.top_token_ids[row] == [int(raw[row].argmax())]
        assert result.top_logprobs[row] == pytest.approx([expected[row].max().item()], abs=1e-5)
    assert (result.top_token_ids[2], result.logprobs[2]) == ([7], pytest.approx(0.0, abs=1e-6))


@pytest.mark.parametrize("seed", [None, 1])
def test_a_row_in_which_nothing_is_allowed_is_flagged_whatever_it_was(sample: Sample, seed: int | None) -> None:
    raw = random_logits(1, 16)
    params = [SamplingParams(seed=seed)]
    result = sample(torch.full((1, 16), -torch.inf), params, [0], RawRows.of(raw, [0], params))
    assert result.is_finite == [False]


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(sample: Sample) -> None:
    logits = random_logits(6, 200)
    params = [SamplingParams(seed=seed, temperature=1.3, top_p=0.95) for seed in (1, 2**64 - 1, 3, 0, 5)] + [GREEDY]
    positions = [0, 5, 2, 0, 9, 1]
    together = sample(logits, params, positions)
    for order in ([5, 3, 1, 0, 2, 4], [2], [4, 0], [1, 1]):
        alone = sample(logits[order], [params[row] for row in order], [positions[row] for row in order])
        assert alone.token_ids == [together.token_ids[row] for row in order]
        assert alone.logprobs == [together.logprobs[row] for row in order]


def test_seeds_and_positions_draw_different_numbers(sample: Sample) -> None:
    logits = torch.zeros(64, 1000)
    by_seed = sample(logits, [SamplingParams(seed=seed) for seed in range(64)], [0] * 64)
    by_position = sample(logits, [SamplingParams(seed=7)] * 64, list(range(64)))
    for result in (by_seed, by_position):
        assert len(set(result.token_ids)) > 55  # 62 expected of 64 draws from 1000


@pytest.mark.parametrize("by", ["seed", "position"])
def test_the_distribution_is_the_models(sample: Sample, by: str) -> None:
    probabilities = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01])
    size, temperature = 20_000, 2.0
    logits = (probabilities.log() * temperature).expand(size, -1).contiguous()
    numbers = list(range(size))
    seeds = numbers if by == "seed" else [12345] * size
    positions = [0] * size if by == "seed" else numbers
    result = sample(logits, [SamplingParams(seed=seed, temperature=temperature) for seed in seeds], positions)
    counts = torch.bincount(torch.tensor(result.token_ids), minlength=7).double()
    expected = probabilities.double() * size
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 22.46  # 6 degrees of freedom, p = 0.001; the draws are fixed, so this never flickers


def test_a_token_without_probability_is_never_drawn(sample: Sample) -> None:
    logits = torch.full((500, 9), -torch.inf)
    logits[:, [3, 5]] = 0.0
    result = sample(logits, [SamplingParams(seed=seed) for seed in range(500)], [0] * 500)
    assert set(result.token_ids) == {3, 5}


def test_a_number_on_an_edge_belongs_to_the_token_that_begins_there() -> None:
    scaled = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf, 0.0, 0.0]])
    for number, token in ((0.0, 1), (0.249, 1), (0.25, 2), (0.5, 4), (0.75, 5), (1 - 2**-53, 5)):
        assert int(sampler_torch._draw(scaled, torch.tensor([number], dtype=torch.float64))[0]) == token


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 17, 99])
@pytest.mark.parametrize(
    "param",
    [
        GREEDY,
        SamplingParams(seed=5),
        SamplingParams(seed=5, top_k=50),
        SamplingParams(seed=5, top_p=0.9),
        SamplingParams(seed=5, top_k=50, top_p=0.9),
        SamplingParams(seed=5, typical_p=0.9, min_p=0.01, num_top_tokens=3, is_logprob_filtered=True),
    ],
    ids=["greedy", "plain", "top_k", "top_p", "both", "typical_p"],
)
def test_a_bad_row_is_flagged_and_only_that_row(
    sample: Sample, value: float, param: SamplingParams, place: int
) -> None:
    logits = random_logits(3, 100)
    clean = logits.clone()
    logits[1, place] = value
    params = [param] * 3
    result = sample(logits, params, [0, 0, 0])
    assert result.is_finite == [True, False, True]
    expected = sample(clean, params, [0, 0, 0])
    for row in (0, 2):
        assert result.token_ids[row] == expected.token_ids[row]
        assert result.logprobs[row] == expected.logprobs[row]


def test_a_row_of_minus_infinity_is_flagged(sample: Sample) -> None:
    assert sample(torch.full((1, 8), -torch.inf), [GREEDY], [0]).is_finite == [False]


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-46])
def test_a_temperature_too_small_for_float32_is_greedy(sample: Sample, temperature: float) -> None:
    logits = random_logits(1, 100)
    params = SamplingParams(seed=3, temperature=temperature, is_logprob_filtered=True)
    result = sample(logits, [params], [0])
    assert (result.token_ids, result.logprobs, result.is_finite) == ([int(logits.argmax())], [0.0], [True])


def test_no_rows(sample: Sample) -> None:
    result = sample(torch.empty(0, 10), [], [])
    assert (result.token_ids, result.logprobs, result.is_finite) == ([], [], [])


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**20)), min_size=1, max_size=20))
def test_uniform_is_in_the_unit_interval_and_pure(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = [seed for seed, _ in pairs], [position for _, position in pairs]
    numbers = uniform(seeds, positions)
    assert ((0.0 <= numbers) & (numbers < 1.0)).all()
    for number, (seed, position) in zip(numbers, pairs, strict=True):
        assert uniform([seed], [position])[0] == number


@pytest.mark.parametrize("step", [1, 2, 2**20, 2**32, 2**63])
def test_uniform_is_spread_over_seeds(step: int) -> None:
    seeds = [(n * step) % 2**64 for n in range(min(10_000, 2**64 // step))]
    check_spread(uniform(seeds, [0] * len(seeds)))


def test_uniform_is_spread_over_positions_and_not_tied_to_neighbours() -> None:
    numbers = uniform([42] * 10_000, list(range(10_000)))
    check_spread(numbers)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.04
    others = uniform([43] * 10_000, list(range(10_000)))
    for first, second in ((numbers, others), (numbers[1:], others[:-1]), (numbers[:-1], others[1:])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.04, "the next seed is another text, not the same one shifted"


def check_spread(numbers: np.ndarray) -> None:
    """Kolmogorov-Smirnov against the uniform distribution, p = 0.001; too few numbers only have to differ."""
    assert len(set(numbers.tolist())) == len(numbers)
    ranks = np.arange(1, len(numbers) + 1) / len(numbers)
    distance = np.abs(np.sort(numbers) - ranks).max()
    assert distance < 1.95 / math.sqrt(len(numbers))
