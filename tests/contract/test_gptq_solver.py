"""GPTQ against a slow reference straight from the paper, and against rounding each weight by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.base import FormatError
from quant.gptq_solver import solve
from quant.rounding import RoundedMatrix, round_to_nearest
from quant.statistics import GRAM_BLOCK, InputStatistics

PERCDAMP = 0.01


def correlated_inputs(num_inputs: int, num_rows: int, seed: int) -> torch.Tensor:
    """[rows, k]: few directions and very different sizes, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_inputs // 4, num_inputs, generator=generator)
    noise = torch.randn(num_rows, num_inputs, generator=generator)
    sizes = torch.randn(num_inputs, generator=generator).exp()
    return (torch.randn(num_rows, num_inputs // 4, generator=generator) @ mixing + 0.3 * noise) * sizes


def problem(num_outputs: int, num_inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [n, k], and the Gram matrix of inputs."""
    x = correlated_inputs(num_inputs, 4 * num_inputs, seed)
    weight = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed + 1))
    return weight, x.T @ x


def loss(matrix: RoundedMatrix, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Squared error of the outputs."""
    error = (matrix.widen() - weight).double()
    return float(((error @ gram.double()) * error).sum())


def reference_q(weight: torch.Tensor, gram: torch.Tensor, matrix: RoundedMatrix, order: torch.Tensor) -> torch.Tensor:
    """The paper's recursion in float64, one input at a time, by the inverse itself: q [n, k] for matrix's scales.

    After input i is fixed it leaves the problem: H^-1 loses row and column i by one step of Gaussian elimination.
    """
    half = 2 ** (matrix.bits - 1)
    damped = gram.double() + PERCDAMP * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    remaining = weight.double().clone()
    q = torch.empty(weight.shape, dtype=torch.float64)
    for index in order.tolist():
        scale = matrix.scales[:, matrix.group_of_input[index]].double()
        q[:, index] = (remaining[:, index] / scale).round().clamp(-half, half - 1)
        error = (remaining[:, index] - q[:, index] * scale) / inverse[index, index]
        remaining -= error[:, None] * inverse[index]
        inverse = inverse - torch.outer(inverse[:, index], inverse[index]) / inverse[index, index]
    return q + half


def rounding_order(gram: torch.Tensor, size: int, is_act_order: bool) -> torch.Tensor:
    diagonal = gram.diagonal()
    if is_act_order:
        return diagonal.argsort(descending=True, stable=True)
    starts = range(0, len(diagonal), size)
    groups = sorted(starts, key=lambda start: -float(diagonal[start : start + size].mean()))
    return torch.cat([start + diagonal[start : start + size].argsort(descending=True) for start in groups])


@pytest.mark.parametrize("is_act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("num_inputs", "group_size"), [(64, 16), (96, 32), (320, 64), (144, 48), (200, -1)])
def test_it_is_the_papers_recursion(num_inputs: int, group_size: int, bits: int, is_act_order: bool) -> None:
    weight, gram = problem(24, num_inputs, seed=num_inputs)
    matrix = solve(weight, gram, bits=bits, group_size=group_size, percdamp=PERCDAMP, is_act_order=is_act_order)
    size = num_inputs if group_size == -1 else group_size
    expected = reference_q(weight, gram, matrix, rounding_order(gram, size, is_act_order))
    # float32 against float64: a weight in the middle between two numbers may fall to either side, and what follows
    # in its row makes up for it.
    is_equal = (matrix.q.double() == expected).all(dim=1)
    assert is_equal.float().mean() > 0.7
    assert (matrix.q.double() - expected).abs().mean() < 0.02 * 2**bits / 4


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32, -1]), st.booleans(), st.integers(0, 2**20))
def test_it_loses_less_than_rounding_to_nearest(bits: int, group_size: int, is_act_order: bool, seed: int) -> None:
    weight, gram = problem(16, 64, seed)
    ours = solve(weight, gram, bits=bits, group_size=group_size, percdamp=PERCDAMP, is_act_order=is_act_order)
    nearest = round_to_nearest(weight, bits=bits, group_size=group_size, is_symmetric=True)
    assert loss(ours, weight, gram) < loss(nearest, weight, gram)


def test_without_act_order_groups_are_plain_and_with_it_each_is_whole() -> None:
    weight, gram = problem(16, 96, seed=3)
    options = {"bits": 4, "group_size": 32, "percdamp": PERCDAMP}
    plain = solve(weight, gram, is_act_order=False, **options)
    assert plain.group_of_input.tolist() == [index // 32 for index in range(96)]
    scattered = solve(weight, gram, is_act_order=True, **options)
    assert scattered.group_of_input.tolist() != plain.group_of_input.tolist()
    assert scattered.group_of_input.bincount().tolist() == [32, 32, 32]
    first = scattered.group_of_input == 0
    assert gram.diagonal()[first].min() >= gram.diagonal()[~first].max()


def test_rows_are_independent_of_each_other() -> None:
    weight, gram = problem(40, 64, seed=5)
    options = {"bits": 4, "group_size": 16, "percdamp": PERCDAMP, "is_act_order": False}
    whole = solve(weight, gram, **options)
    part = whole.rows(slice(8, 24))
    alone = solve(weight[8:24], gram, **options)
    assert torch.equal(part.scales, alone.scales)
    assert (part.q == alone.q).float().mean() > 0.999


def test_inputs_that_are_always_zero() -> None:
    weight, gram = problem(16, 64, seed=7)
    gram[[3, 40]] = 0
    gram[:, [3, 40]] = 0
    matrix = solve(weight, gram, bits=4, group_size=16, percdamp=PERCDAMP, is_act_order=False)
    assert not matrix.widen()[:, [3, 40]].any()
    assert solve(weight, torch.zeros(64, 64), bits=4, group_size=16, percdamp=0.01, is_act_order=False)


def test_fewer_rows_than_inputs_are_damped() -> None:
    x = correlated_inputs(64, 3, seed=9)
    weight, _ = problem(16, 64, seed=9)
    matrix = solve(weight, x.T @ x, bits=4, group_size=16, percdamp=1e-9, is_act_order=False)
    assert matrix.widen().isfinite().all()


def test_inputs_that_are_no_numbers() -> None:
    weight, gram = problem(16, 64, seed=11)
    gram[5, 5] = torch.nan
    with pytest.raises(FormatError, match="has inputs that are not finite on this dataset"):
        solve(weight, gram, bits=4, group_size=16, percdamp=PERCDAMP, is_act_order=False)


@pytest.mark.parametrize("num_inputs", [1, 64, GRAM_BLOCK, GRAM_BLOCK + 1, 2 * GRAM_BLOCK + 8])
def test_statistics(num_inputs: int) -> None:
    x = torch.randn(50, num_inputs, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics(num_inputs, torch.device("cpu"))
    statistics.add(x[:20])
    statistics.add(x[20:])
    torch.testing.assert_close(statistics.gram, x.T @ x, rtol=1e-5, atol=1e-4)
    assert torch.equal(statistics.gram, statistics.gram.T)
    torch.testing.assert_close(statistics.mean_abs, x.abs().mean(dim=0))
