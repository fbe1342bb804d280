"""Dense matrix product on a CPU: float32 activations, weights as stored (bfloat16, float16, float32), float32 sums.

One kernel serves one row and a thousand: each output is `WIDTH` lanes of fused multiply-adds along `k`, folded by a
fixed tree, in every tile shape, so a row's bits do not depend on how many rows run with it. Few rows are bound by
reading the weights (they are read once for four rows); many rows are bound by arithmetic, and need no widened copy of
the weights (docs/performance.md has the figures).
"""

from __future__ import annotations

import torch
from numba import get_num_threads, njit, prange

from quant.base import PackedWeight
from quant.kernels.arrays import FAST, call, flat_view, new_output
from quant.kernels.dense_ops import splits_pairs
from quant.kernels.dense_rows import ROWS, TILE_OUTPUTS, TILES, multiply_tile, rows_per_block, split_rows
from quant.kernels.simd import LANES
from quant.kernels.work_split import even_block, new_claims, next_piece, tiles_of_piece


@njit(parallel=True, **FAST)
def _product(x, w, bias, out, n_size, k_size, row_block, num_threads):  # type: ignore[no-untyped-def]
    num_rows, rows = len(x) // k_size, x
    if splits_pairs(w):
        rows = split_rows(x, num_rows, k_size)
    num_tiles = (n_size + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    claims = new_claims(num_threads)
    tiles_each = tiles_of_piece(TILE_OUTPUTS * k_size, num_rows, row_block)
    tiles_each = (tiles_each + TILES - 1) // TILES * TILES
    for thread in prange(num_threads):
        turn = 0
        while turn >= 0:
            turn, first_tile, last_tile, first_row, end = next_piece(
                claims, thread, turn, num_threads, num_tiles, num_rows, ROWS, row_block, tiles_each
            )
            size = even_block(end - first_row, row_block, ROWS)
            for row in range(first_row, end, size):
                last_row = min(end, row + size)
                for tile in range(first_tile, last_tile, TILES):
                    first_n = tile * TILE_OUTPUTS
                    last_n = min(n_size, min(last_tile, tile + TILES) * TILE_OUTPUTS)
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
        self._row_block = rows_per_block(self._k_size)
        self._num_threads = get_num_threads()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out, flat_out = new_output(x.shape[0], self._n_size)
        sizes = self._n_size, self._k_size, self._row_block, self._num_threads
        call(_product, flat_view(x), self._weight, self._bias, flat_out, *sizes)
        return out
