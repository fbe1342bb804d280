"""The product of bfloat16 pairs against its rule, bit by bit, at the edges of tiles; and a row's bits beside others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from quant.base import PackedWeight
from quant.kernels import MATRICES, choose_kernel, dense_ops
from quant.kernels.arrays import flat_view
from quant.kernels.bfloat16_cpu import Bfloat16Cpu
from quant.kernels.dense_cpu import DenseCpu
from quant.kernels.dense_ops import PAIRS, make_tile
from quant.kernels.dense_rows import TILE_OUTPUTS, rows_per_block

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(n_size: int, k_size: int) -> PackedWeight:
    return PackedWeight("dense", random(n_size, k_size, seed=1).bfloat16(), random(n_size, seed=2))


def by_the_rule(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Rounded rows; the second inputs of 16 pairs are added to 16 lanes, then the first ones; lanes fold by halves."""
    assert weight.bias is not None
    rows, outputs = (factor.bfloat16().double().unflatten(1, (-1, 16, 2)) for factor in (x, weight.weight))
    products = rows[:, None] * outputs[None]
    lanes = torch.zeros(len(x), len(weight.weight), 16)
    for step in range(products.shape[2]):
        for place in (1, 0):
            lanes = (lanes.double() + products[:, :, step, :, place]).float()
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, dim=-1)
        lanes = low + high
    return lanes[..., 0] + weight.bias


@pytest.mark.parametrize("k_size", [32, 96, 896])
@pytest.mark.parametrize("n_size", [1, 3, 11, 12, 13, 24, 47])
def test_every_bit_is_that_of_the_rule(n_size: int, k_size: int) -> None:
    weight, x = packed(n_size, k_size), random(64, k_size)
    kernel, expected = Bfloat16Cpu(weight), by_the_rule(x, weight)
    for rows in ROWS:
        for start in (0, 1, 64 - rows):
            part = slice(start, start + rows)
            assert torch.equal(kernel(x[part].contiguous()), expected[part]), "whatever runs beside it"


@pytest.mark.parametrize("k_size", [1024, 2080, 8960])
def test_rows_beyond_one_row_block(k_size: int) -> None:
    """Rows of the second block are rows like any other, and so are rows that take their inputs in parts."""
    block = rows_per_block(2 * k_size)
    x, weight = random(block + 7, k_size), packed(TILE_OUTPUTS + 1, k_size)
    kernel = Bfloat16Cpu(weight)
    whole = kernel(x)
    for row in (0, block - 1, block, block + 6):
        one = x[row : row + 1]
        assert torch.equal(whole[row], kernel(one)[0])
        assert torch.equal(whole[row], by_the_rule(one, weight)[0])


def test_without_a_bias() -> None:
    weight, x = packed(13, 32), random(3, 32)
    zeros = PackedWeight("dense", weight.weight, torch.zeros(13))
    assert torch.equal(Bfloat16Cpu(weight.without_bias())(x), Bfloat16Cpu(zeros)(x))


def test_activations_are_rounded_to_the_nearest_and_halves_to_even() -> None:
    numbers = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-9, -1 - 2**-8, 0.0])
    x = torch.zeros(len(numbers), 32)
    x[:, 5] = numbers
    out = Bfloat16Cpu(PackedWeight("dense", torch.ones(1, 32).bfloat16()))(x)
    assert out[:, 0].tolist() == [1, 1 + 2**-6, 1 + 2**-7, 1, -1, 0]


def test_not_a_number_stays_in_its_row() -> None:
    x = random(9, 32)
    x[4, 3] = torch.nan
    x[6, 0] = torch.inf
    out = Bfloat16Cpu(packed(12, 32))(x)
    assert out.isfinite().all(dim=1).tolist() == [row not in (4, 6) for row in range(9)]
    assert out[4].isnan().all()


def test_no_rows() -> None:
    assert Bfloat16Cpu(packed(12, 32))(torch.empty(0, 32)).shape == (0, 12)


def test_two_additions_have_the_bits_of_the_one_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor without AVX512-BF16 computes. Elsewhere both are the same code."""
    factors = [(random(2, 640, seed=seed) * 2.0 ** random(2, 640, seed=seed + 2)).bfloat16() for seed in (0, 1)]
    results = []
    for has_pairs in (dense_ops.HAS_PAIRS, False):
        monkeypatch.setattr(dense_ops, "HAS_PAIRS", has_pairs)
        tile = make_tile(2, 2, 0, PAIRS)

        @njit
        def product(x: Any, w: Any, bias: Any, out: Any, tile: Any = tile) -> None:
            tile(x, 0, w, 0, 640, bias, 0, out, 0, 2)  # noqa: B023

        results.append(np.zeros(4, np.float32))
        product(*map(flat_view, factors), np.zeros(2, np.float32), results[-1])
    assert results[0].tobytes() == results[1].tobytes()
    assert len(set(results[0])) == 4


def test_only_who_allows_rounding_gets_it_and_only_weights_that_it_can_take() -> None:
    assert MATRICES["cpu"]["dense"][0].endswith(":Bfloat16Cpu")
    dense = packed(12, 64)
    rounded = Bfloat16Cpu if dense_ops.HAS_AVX512 else DenseCpu
    assert type(choose_kernel("cpu", dense, is_exact=False)) is rounded
    assert type(choose_kernel("cpu", dense)) is DenseCpu
    for weight in (dense.weight.float(), dense.weight.half(), random(12, 40).bfloat16()):
        assert type(choose_kernel("cpu", PackedWeight("dense", weight), is_exact=False)) is DenseCpu
