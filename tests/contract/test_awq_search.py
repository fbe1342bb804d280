"""AWQ's scales and clips lose less than rounding alone."""

from __future__ import annotations

import pytest
import torch

from quant.awq_search import round_clipped, search_scales
from quant.rounding import round_to_nearest
from quant.statistics import InputStatistics
from tests.contract.test_gptq_solver import correlated_inputs


def problem(num_outputs: int, num_inputs: int, seed: int) -> tuple[torch.Tensor, InputStatistics, torch.Tensor]:
    """A weight, the statistics of its inputs, and the inputs: one in sixteen is a hundred times as large."""
    x = correlated_inputs(num_inputs, 4 * num_inputs, seed)
    x[:, ::16] *= 100
    weight = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed + 1))
    statistics = InputStatistics(num_inputs, torch.device("cpu"))
    statistics.add(x)
    return weight, statistics, x


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("seed", range(4))
def test_scales_and_clips_each_lose_less(group_size: int, seed: int) -> None:
    weight, statistics, x = problem(48, 64, seed)
    scales = search_scales([weight[:32], weight[32:]], statistics, group_size)
    assert scales.shape == (64,)
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-3)
    assert float(scales[::16].mean()) > float(scales.mean())

    def loss(scales: torch.Tensor, *, is_clipping: bool) -> float:
        matrix = round_clipped(weight * scales, statistics.gram, scales, group_size=group_size, is_clipping=is_clipping)
        return float(((x / scales) @ matrix.widen().T - x @ weight.T).square().sum())

    ones = torch.ones(64)
    plain = round_to_nearest(weight, bits=4, group_size=group_size, is_symmetric=False)
    nearest = float((x @ plain.widen().T - x @ weight.T).square().sum())
    assert loss(ones, is_clipping=False) == nearest
    assert loss(scales, is_clipping=False) < nearest
    # With one group its own inputs are all there are; of several, clipping can't know how their errors meet.
    assert loss(scales, is_clipping=True) < (loss(scales, is_clipping=False) if group_size == -1 else nearest)


def test_scaling_that_helps_nobody_is_left() -> None:
    weight = torch.ones(16, 32)
    statistics = InputStatistics(32, torch.device("cpu"))
    statistics.add(torch.ones(8, 32))
    assert torch.equal(search_scales([weight], statistics, 32), torch.ones(32))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, statistics, x = problem(16, 64, seed=1)
    x[:, :8] = 0
    statistics = InputStatistics(64, torch.device("cpu"))
    statistics.add(x)
    assert search_scales([weight], statistics, 32).isfinite().all()
