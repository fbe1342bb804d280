"""Any number of rows times some outputs, made of register tiles (`dense_ops`), in parts that stay in the L1 cache.

Four rows at a time walk over all inputs of a few outputs. Where those weights do not fit the cache, all rows take the
first part of the inputs, then all the next: the sums wait in memory between the parts, so no bit depends on them.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from quant.kernels.dense_ops import SPLIT, STEP_INPUTS, WIDTH, make_part_tile, make_tile, split_row
from quant.kernels.simd import LANES

TILE_OUTPUTS = 12
"""Outputs per parallel item: a multiple of what the tiles have."""
ROWS = 4
"""Rows of the largest tile."""
LONG_STREAM = 2048
"""From this many inputs on the processor's own prefetching is 10 % faster than ours, which evicts what is in use."""
ROW_BLOCK_BYTES = 1 << 18
"""Activations that stay in the L2 cache while a thread walks over its weights."""
MIN_ROW_BLOCK = 64
"""Rows that share a reading of the weights even where their activations do not fit: they come from the L3 cache in
time, and the weights of a large model from memory do not."""


_single = make_tile(1, 1, ahead=0, loading=SPLIT)
_ONE_OUTPUTS, _AHEAD_OF_ONE = (1, 0) if WIDTH > LANES else (2, 2)
"""With AVX-512 one row waits for memory alone: one core of Zen 5 reads 896 and 1,536 inputs of bfloat16 as a single
stream a quarter faster than as two. Half as wide, one sum at a time would wait for itself."""
_one_row = make_tile(1, _ONE_OUTPUTS, ahead=_AHEAD_OF_ONE, loading=SPLIT)
_one_long_row = make_tile(1, 4, ahead=0, loading=SPLIT)
_MANY_OUTPUTS, _LINES = (6, 1) if WIDTH > LANES else (3, 2)
_TWO_OUTPUTS = 4 if WIDTH > LANES else _MANY_OUTPUTS
_two_rows = make_tile(2, _TWO_OUTPUTS, ahead=_TWO_OUTPUTS, loading=SPLIT, lines=_LINES)
_three_rows = make_tile(3, _MANY_OUTPUTS, ahead=_MANY_OUTPUTS, loading=SPLIT, lines=_LINES)
_many_rows = make_tile(ROWS, _MANY_OUTPUTS, ahead=_MANY_OUTPUTS, loading=SPLIT, lines=_LINES)
# Of four rows behind the first four, for which the weights lie in the cache: they are not asked for.
_again_rows = _many_rows if WIDTH > LANES else make_tile(ROWS, _MANY_OUTPUTS, ahead=0, loading=SPLIT)
_part_rows = make_part_tile(ROWS, _MANY_OUTPUTS, SPLIT)
_MAX_PART, TILES = (1024, 1) if WIDTH > LANES else (0, 4)
"""Inputs of six weights and four rows that the L1 cache has place for, and tiles that rows pass one after the other.
With half as many lanes the L2 cache is quick enough: there weights of so many tiles wait for the next rows, whole."""


def rows_per_block(k_size: int) -> int:
    """Rows of so many inputs that a thread takes at a time: whole tiles."""
    return max(MIN_ROW_BLOCK, ROW_BLOCK_BYTES // (4 * k_size) // ROWS * ROWS)


@njit(inline="always")
def split_rows(x, num_rows, k_size):  # type: ignore[no-untyped-def]
    """x float32 flat [num_rows, k_size] in the order of `SPLIT`, made within a parallel function."""
    rows = np.empty(num_rows * k_size, np.float32)
    if num_rows < ROWS:  # a parallel region takes longer to start
        for row in range(num_rows):
            split_row(x, row, k_size, rows)
    else:
        for row in prange(num_rows):
            split_row(x, row, k_size, rows)
    return rows


@njit(inline="always")
def multiply_tile(x, w, w_first, bias, out, first_row, last_row, first_n, last_n, n_size, k_size):  # type: ignore[no-untyped-def]
    """Rows of x times some rows of w, of which the first lies at `w_first`; some tiles of TILE_OUTPUTS, and a rest.

    x is float32 flat [*, k_size], as `split_row` orders it for such w; bias [n_size], out [*, n_size].
    """
    rest_n = last_n - (last_n - first_n) % TILE_OUTPUTS
    for r in range(first_row, last_row):
        for n in range(rest_n, last_n):
            w0 = w_first + (n - first_n) * k_size
            _single(x, r * k_size, w, w0, k_size, bias, n, out, r * n_size + n, n_size)
    last_n = rest_n
    row = first_row if first_n < last_n else last_row
    if _MAX_PART > 0 and k_size > _MAX_PART and row + 2 * ROWS <= last_row:
        num_tiles = (last_row - row) // ROWS
        size = ROWS * WIDTH
        num_groups = (last_n - first_n) // _MANY_OUTPUTS
        sums = np.empty(num_tiles * num_groups * _MANY_OUTPUTS * size, np.float32)
        num_parts = (k_size + _MAX_PART - 1) // _MAX_PART
        part = (k_size // num_parts + STEP_INPUTS - 1) // STEP_INPUTS * STEP_INPUTS
        for k in range(0, k_size, part):
            end = min(k + part, k_size)
            for index in range(num_tiles * num_groups):
                t, group = index % num_tiles, index // num_tiles
                r, n = row + t * ROWS, first_n + group * _MANY_OUTPUTS
                w0 = w_first + group * _MANY_OUTPUTS * k_size
                s0 = (t * num_groups + group) * _MANY_OUTPUTS * size
                _part_rows(x, r * k_size, w, w0, k_size, k, end, sums, s0, bias, n, out, r * n_size + n, n_size)
        row += num_tiles * ROWS
    while row + ROWS <= last_row:
        for n in range(first_n, last_n, _MANY_OUTPUTS):
            w0 = w_first + (n - first_n) * k_size
            if row == first_row:
                _many_rows(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
            else:
                _again_rows(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
        row += ROWS
    if row + 3 == last_row:
        for n in range(first_n, last_n, _MANY_OUTPUTS):
            w0 = w_first + (n - first_n) * k_size
            _three_rows(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
        row += 3
    if row + 2 == last_row:
        for n in range(first_n, last_n, _TWO_OUTPUTS):
            w0 = w_first + (n - first_n) * k_size
            _two_rows(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
        row += 2
    if row < last_row and k_size < LONG_STREAM:
        for n in range(first_n, last_n, _ONE_OUTPUTS):
            w0 = w_first + (n - first_n) * k_size
            _one_row(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
    elif row < last_row:
        for n in range(first_n, last_n, 4):
            w0 = w_first + (n - first_n) * k_size
            _one_long_row(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
