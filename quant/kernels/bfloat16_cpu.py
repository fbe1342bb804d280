"""Dense matrix product on a CPU whose factors are bfloat16: activations are rounded to it, sums are float32.

One rule for every number of rows: each number of a row is rounded to the nearest bfloat16, ties to even, and pairs of
inputs are added to 16 lanes as `dense_ops.PAIRS` says. Weights are read where they lie. A row's bits depend neither on
how many rows run with it nor on whether the processor has AVX512-BF16.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from quant.base import PackedWeight
from quant.kernels.arrays import FAST
from quant.kernels.dense_cpu import DenseCpu
from quant.kernels.dense_ops import HAS_PAIRS, PAIRS, make_part_tile, make_tile
from quant.kernels.dense_rows import ROWS, TILE_OUTPUTS, multiply_rows, write_rows
from quant.kernels.simd import HAS_AVX512, load16, store
from quant.kernels.work_split import NUM_RECTANGLES, even_block, rectangle

# None asks for weights ahead of their use: the processor's own guesses are faster on Zen 5.
_single, _one_row, _two_rows = (make_tile(*shape, ahead=0, products=PAIRS) for shape in ((1, 1), (1, 4), (2, 4)))
_MANY_OUTPUTS = 6 if HAS_PAIRS else 4
"""Without the instruction a tile also needs registers for inputs that are taken apart."""
_three_rows = make_tile(3, _MANY_OUTPUTS, ahead=0, products=PAIRS)
_many_rows = make_tile(ROWS, _MANY_OUTPUTS, ahead=0, products=PAIRS)
_part_rows = make_part_tile(ROWS, _MANY_OUTPUTS, PAIRS)
_MAX_PART = 2048
"""Inputs of six weights and four rows that the L1 cache has place for."""


@njit(inline="always")
def _round_row(x, row, k_size, rounded):  # type: ignore[no-untyped-def]
    for k in range(row * k_size, (row + 1) * k_size, 16):
        store(rounded, k, load16(x, k))


@njit(parallel=True, **FAST)
def _product(x, w, bias, out, num_rows, n_size, k_size, row_block, num_threads):  # type: ignore[no-untyped-def]
    rounded = np.empty(num_rows * k_size, np.uint16)
    write_rows(_round_row, x, num_rows, k_size, rounded)
    num_tiles = (n_size + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    for item in prange(num_threads * NUM_RECTANGLES):
        thread, index = item // NUM_RECTANGLES, item % NUM_RECTANGLES
        first_tile, last_tile, first_row, end = rectangle(index, thread, num_threads, num_tiles, num_rows, ROWS)
        size = even_block(end - first_row, row_block, ROWS)
        for row in range(first_row, end, size):
            last_row = min(end, row + size)
            for tile in range(first_tile, last_tile):
                first_n = tile * TILE_OUTPUTS
                last_n = min(n_size, first_n + TILE_OUTPUTS)
                multiply_rows(
                    _single, _one_row, _one_row, _two_rows, _three_rows, _many_rows, _many_rows, _part_rows,
                    4, 4, _MANY_OUTPUTS, _MAX_PART,
                    rounded, w, first_n * k_size, bias, out, row, last_row, first_n, last_n, n_size, k_size,
                )  # fmt: skip


class Bfloat16Cpu(DenseCpu):
    """`x @ weight.T + bias`: x [rows, k] float32, rounded first, weight [n, k] bfloat16 -> [rows, n] float32."""

    rounding = ("AVX512-BF16" if HAS_PAIRS else "AVX-512") if HAS_AVX512 else None
    product = staticmethod(_product)
    input_bytes = 2

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        reasons = []
        if not HAS_AVX512:
            reasons.append("the processor has no AVX-512, without which pairs of bfloat16 are slower than float32")
        if packed.weight.dtype != torch.bfloat16:
            reasons.append(f"weights are {packed.weight.dtype}, not bfloat16")
        if packed.num_inputs % PAIRS.inputs:
            reasons.append(f"input sizes must be a multiple of {PAIRS.inputs}, not {packed.num_inputs}")
        return reasons
