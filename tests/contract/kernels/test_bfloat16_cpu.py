"""The product of bfloat16 pairs against its rule, bit by bit, at the edges of tiles; and a row's bits beside others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from quant.base import PackedWeight
from quant.kernels import MATRICES, choose_kernel
from quant.kernels.amx import HAS_AMX
from quant.kernels.arrays import flat_view
from quant.kernels.bfloat16_amx_cpu import Bfloat16Amx
from quant.kernels.bfloat16_cpu import MAX_INPUTS, ROW_BLOCK, Bfloat16Cpu, interleave
from quant.kernels.bfloat16_ops import HAS_PAIRS, OUTPUTS, ROWS, multiply_block
from quant.kernels.dense_cpu import DenseCpu
from quant.kernels.simd import HAS_AVX512

ROW_COUNTS = [*range(1, ROWS + 2), 17, 25, 64]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(n_size: int, k_size: int) -> PackedWeight:
    return PackedWeight("dense", random(n_size, k_size, seed=1).bfloat16(), random(n_size, seed=2))


def by_the_rule(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Rounded rows; of every two inputs the second one's product is added first, then the first one's."""
    assert weight.bias is not None
    rows, outputs = (factor.bfloat16().double().unflatten(1, (-1, 2)) for factor in (x, weight.weight))
    sums = torch.zeros(len(x), len(weight.weight))
    for pair in range(rows.shape[1]):
        for half in (1, 0):
            sums = (sums.double() + rows[:, None, pair, half] * outputs[:, pair, half]).float()
    return sums + weight.bias


@pytest.mark.parametrize("k_size", [16, 48, 896])
@pytest.mark.parametrize("n_size", [1, 31, 32, 33, 96, 127])
def test_every_bit_is_that_of_the_rule(n_size: int, k_size: int) -> None:
    weight, x = packed(n_size, k_size), random(64, k_size)
    kernel, expected = Bfloat16Cpu(weight), by_the_rule(x, weight)
    for rows in ROW_COUNTS:
        for start in (0, 1, 64 - rows):
            part = slice(start, start + rows)
            assert torch.equal(kernel(x[part].contiguous()), expected[part]), "whatever runs beside it"


def test_rows_beyond_one_row_block() -> None:
    """Rows of the second block are rows like any other, and so are those of the last tile, which has fewer."""
    weight, x = packed(OUTPUTS + 1, 1024), random(ROW_BLOCK + 7, 1024)
    kernel = Bfloat16Cpu(weight)
    whole = kernel(x)
    for row in (0, 143, 144, ROW_BLOCK + 3, ROW_BLOCK + 6):  # blocks are alike: the first has 144 rows
        one = x[row : row + 1]
        assert torch.equal(whole[row], kernel(one)[0])
        assert torch.equal(whole[row], by_the_rule(one, weight)[0])


@pytest.mark.parametrize("k_size", [MAX_INPUTS, MAX_INPUTS + 16, 2 * MAX_INPUTS + 48])
def test_sums_wait_between_stretches_of_many_inputs(k_size: int) -> None:
    weight, x = packed(OUTPUTS + 1, k_size), random(ROW_BLOCK + 2, k_size)
    kernel = Bfloat16Cpu(weight)
    whole = kernel(x)
    first = by_the_rule(x[:1], weight)[0]
    for rows in (1, ROWS, 2 * ROWS + 5, len(x)):
        for start in (0, len(x) - rows):
            assert torch.equal(kernel(x[start : start + rows].contiguous()), whole[start : start + rows])
    assert torch.equal(whole[0], first)


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


@pytest.mark.skipif(not HAS_PAIRS, reason="the processor has no AVX512-BF16")
def test_two_additions_have_the_bits_of_the_one_instruction() -> None:
    """What a processor without AVX512-BF16 computes."""
    x, w = ((random(n, 640, seed=n) * 2.0 ** random(n, 640, seed=n + 1)).bfloat16() for n in (2, OUTPUTS))
    weights = np.empty(w.numel(), np.uint16)
    interleave(flat_view(w), np.arange(OUTPUTS), 640, weights)

    @njit
    def product(x: Any, w: Any, bias: Any, out: Any) -> None:
        multiply_block(x, w, bias, out, out, 2, (0, 0, 0, 0, OUTPUTS, 640, 0, 640), 0, 1)

    results = [np.zeros(2 * OUTPUTS, np.float32) for _ in range(2)]
    for rounded, out in zip((x, x.float()), results, strict=True):
        product(flat_view(rounded), weights, np.zeros(OUTPUTS, np.float32), out)
    assert results[0].tobytes() == results[1].tobytes()
    assert len(set(results[0])) == 2 * OUTPUTS


def test_only_who_allows_rounding_gets_it_and_only_weights_that_it_can_take() -> None:
    assert [entry.split(":")[1] for entry in MATRICES["cpu"]["dense"]] == ["Bfloat16Amx", "Bfloat16Cpu", "DenseCpu"]
    dense = packed(12, 64)
    rounded = Bfloat16Amx if HAS_AMX else Bfloat16Cpu if HAS_AVX512 else DenseCpu
    assert type(choose_kernel("cpu", dense, is_exact=False)) is rounded
    if HAS_AVX512:
        assert type(choose_kernel("cpu", packed(12, 48), is_exact=False)) is Bfloat16Cpu
    assert type(choose_kernel("cpu", dense)) is DenseCpu
    for weight in (dense.weight.float(), dense.weight.half(), random(12, 24).bfloat16()):
        assert type(choose_kernel("cpu", PackedWeight("dense", weight), is_exact=False)) is DenseCpu
