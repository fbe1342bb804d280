"""Dense matrix product on a CPU: float32 activations, weights as stored (bfloat16, float16, float32), float32 sums.

One kernel serves one row and a thousand: each output is `WIDTH` lanes of fused multiply-adds along `k`, folded by a
fixed tree, in every tile shape, so a row's bits do not depend on how many rows run with it. Few rows are bound by
reading the weights (they are read once for four rows); many rows are bound by arithmetic, and need no widened copy of
the weights (docs/performance.md has the figures).
"""

from __future__ import annotations

import numpy as np
import torch
from numba import get_num_threads, njit, prange

from quant.base import PackedWeight
from quant.kernels.arrays import FAST, call, flat_view, new_output
from quant.kernels.dense_ops import SPLIT, WIDTH, make_part_tile, make_tile, split_row, splits_pairs
from quant.kernels.dense_rows import ROWS, TILE_OUTPUTS, multiply_rows, rows_per_block, write_rows
from quant.kernels.simd import LANES
from quant.kernels.work_split import NUM_RECTANGLES, even_block, rectangle

_single = make_tile(1, 1, ahead=0, products=SPLIT)
_ONE_OUTPUTS, _AHEAD_OF_ONE = (1, 0) if WIDTH > LANES else (2, 2)
"""With AVX-512 one row waits for memory alone: one core of Zen 5 reads 896 and 1,536 inputs of bfloat16 as a single
stream a quarter faster than as two. Half as wide, one sum at a time would wait for itself."""
_one_row = make_tile(1, _ONE_OUTPUTS, ahead=_AHEAD_OF_ONE, products=SPLIT)
_one_long_row = make_tile(1, 4, ahead=0, products=SPLIT)
_MANY_OUTPUTS, _LINES = (6, 1) if WIDTH > LANES else (3, 2)
_TWO_OUTPUTS = 4 if WIDTH > LANES else _MANY_OUTPUTS
_two_rows = make_tile(2, _TWO_OUTPUTS, ahead=_TWO_OUTPUTS, products=SPLIT, lines=_LINES)
_three_rows = make_tile(3, _MANY_OUTPUTS, ahead=_MANY_OUTPUTS, products=SPLIT, lines=_LINES)
_many_rows = make_tile(ROWS, _MANY_OUTPUTS, ahead=_MANY_OUTPUTS, products=SPLIT, lines=_LINES)
_again_rows = _many_rows if WIDTH > LANES else make_tile(ROWS, _MANY_OUTPUTS, ahead=0, products=SPLIT)
_part_rows = make_part_tile(ROWS, _MANY_OUTPUTS, SPLIT)
_MAX_PART, _TILES = (1024, 1) if WIDTH > LANES else (0, 4)
"""Inputs of six weights and four rows that the L1 cache has place for, and tiles that rows pass one after the other.
With half as many lanes the L2 cache is quick enough: there weights of so many tiles wait for the next rows, whole."""


@njit(inline="always")
def multiply_tile(x, w, w_first, bias, out, first_row, last_row, first_n, last_n, n_size, k_size):  # type: ignore[no-untyped-def]
    """Rows of x times some rows of w, of which the first lies at `w_first`; x as `split_row` orders it for such w."""
    multiply_rows(
        _single, _one_row, _one_long_row, _two_rows, _three_rows, _many_rows, _again_rows, _part_rows,
        _ONE_OUTPUTS, _TWO_OUTPUTS, _MANY_OUTPUTS, _MAX_PART,
        x, w, w_first, bias, out, first_row, last_row, first_n, last_n, n_size, k_size,
    )  # fmt: skip


@njit(parallel=True, **FAST)
def _product(x, w, bias, out, num_rows, n_size, k_size, row_block, num_threads):  # type: ignore[no-untyped-def]
    rows = x
    if splits_pairs(w):
        rows = np.empty(num_rows * k_size, np.float32)
        write_rows(split_row, x, num_rows, k_size, rows)
    num_tiles = (n_size + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    for item in prange(num_threads * NUM_RECTANGLES):
        thread, index = item // NUM_RECTANGLES, item % NUM_RECTANGLES
        first_tile, last_tile, first_row, end = rectangle(index, thread, num_threads, num_tiles, num_rows, ROWS)
        size = even_block(end - first_row, row_block, ROWS)
        for row in range(first_row, end, size):
            last_row = min(end, row + size)
            for tile in range(first_tile, last_tile, _TILES):
                first_n = tile * TILE_OUTPUTS
                last_n = min(n_size, min(last_tile, tile + _TILES) * TILE_OUTPUTS)
                multiply_tile(rows, w, first_n * k_size, bias, out, row, last_row, first_n, last_n, n_size, k_size)


class DenseCpu:
    """`x @ weight.T + bias`: x [rows, k] float32, weight [n, k] as stored, bias [n] float32 -> [rows, n] float32."""

    rounding: str | None = None
    row_counts = ()

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        if packed.num_inputs % LANES:
            return [f"the CPU kernel needs input sizes that are a multiple of {LANES}, not {packed.num_inputs}"]
        return []

    def __init__(self, packed: PackedWeight) -> None:
        weight, bias = packed.weight, packed.bias
        self._n_size, self._k_size = weight.shape
        self._weight = flat_view(weight)
        self._bias = flat_view(torch.zeros(self._n_size) if bias is None else bias.to(torch.float32))
        self._row_block = rows_per_block(4 * self._k_size)
        self._num_threads = get_num_threads()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        out, flat_out = new_output(num_rows, self._n_size)
        sizes = num_rows, self._n_size, self._k_size, self._row_block, self._num_threads
        call(_product, flat_view(x), self._weight, self._bias, flat_out, *sizes)
        return out
