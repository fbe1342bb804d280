"""Any number of rows times some outputs, made of register tiles (`dense_ops`), in parts that stay in the L1 cache.

Four rows at a time walk over all inputs of a few outputs. Where those weights do not fit the cache, all rows take the
first part of the inputs, then all the next: the sums wait in memory between the parts, so no bit depends on them.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

TILE_OUTPUTS = 12
"""Outputs per parallel item: a multiple of what the tiles have."""
ROWS = 4
"""Rows of the largest tile."""
MAX_LANES = 16
"""Lanes of an accumulator, at most."""
LONG_STREAM = 2048
"""From this many inputs on the processor's own prefetching is 10 % faster than ours, which evicts what is in use."""
ROW_BLOCK_BYTES = 1 << 18
"""Activations that stay in the L2 cache while a thread walks over its weights."""
MIN_ROW_BLOCK = 64
"""Rows that share a reading of the weights even where their activations do not fit: they come from the L3 cache in
time, and the weights of a large model from memory do not."""


def rows_per_block(row_bytes: int) -> int:
    """Rows that a thread takes at a time: whole tiles."""
    return max(MIN_ROW_BLOCK, ROW_BLOCK_BYTES // row_bytes // ROWS * ROWS)


@njit(inline="always")
def write_rows(write_row, x, num_rows, k_size, written):  # type: ignore[no-untyped-def]
    """Let `write_row(x, row, k_size, written)` write each row of x [num_rows, k_size], within a parallel function."""
    if num_rows < ROWS:  # a parallel region takes longer to start
        for row in range(num_rows):
            write_row(x, row, k_size, written)
    else:
        for row in prange(num_rows):
            write_row(x, row, k_size, written)


@njit(inline="always")
def multiply_rows(  # type: ignore[no-untyped-def]
    single, one_row, one_long_row, two_rows, three_rows, many_rows, again_rows, part_rows,
    one_outputs, two_outputs, many_outputs, max_part,
    x, w, w_first, bias, out, first_row, last_row, first_n, last_n, n_size, k_size,
):  # fmt: skip
    """Rows of x times some rows of w, of which the first lies at `w_first`; some tiles of TILE_OUTPUTS, and a rest.

    The first eight arguments are tiles. `single` has one row and one output, `one_row` `one_outputs`, `one_long_row` 4,
    `two_rows` `two_outputs`; the others have `many_outputs`. `many_rows` takes the first four rows, `again_rows` four
    others, for which the weights lie in the cache, and `part_rows` four and at most `max_part` inputs (0: not used).
    """
    rest_n = last_n - (last_n - first_n) % TILE_OUTPUTS
    for r in range(first_row, last_row):
        for n in range(rest_n, last_n):
            w0 = w_first + (n - first_n) * k_size
            single(x, r * k_size, w, w0, k_size, bias, n, out, r * n_size + n, n_size)
    last_n = rest_n
    row = first_row if first_n < last_n else last_row
    if max_part > 0 and k_size > max_part and row + 2 * ROWS <= last_row:
        num_tiles = (last_row - row) // ROWS
        size = ROWS * MAX_LANES
        num_groups = (last_n - first_n) // many_outputs
        sums = np.empty(num_tiles * num_groups * many_outputs * size, np.float32)
        num_parts = (k_size + max_part - 1) // max_part
        part = (k_size // num_parts + 31) // 32 * 32
        for k in range(0, k_size, part):
            end = min(k + part, k_size)
            for index in range(num_tiles * num_groups):
                t, group = index % num_tiles, index // num_tiles
                r, n = row + t * ROWS, first_n + group * many_outputs
                w0 = w_first + group * many_outputs * k_size
                s0 = (t * num_groups + group) * many_outputs * size
                part_rows(x, r * k_size, w, w0, k_size, k, end, sums, s0, bias, n, out, r * n_size + n, n_size)
        row += num_tiles * ROWS
    while row + ROWS <= last_row:
        for n in range(first_n, last_n, many_outputs):
            w0 = w_first + (n - first_n) * k_size
            if row == first_row:
                many_rows(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
            else:
                again_rows(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
        row += ROWS
    if row + 3 == last_row:
        for n in range(first_n, last_n, many_outputs):
            w0 = w_first + (n - first_n) * k_size
            three_rows(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
        row += 3
    if row + 2 == last_row:
        for n in range(first_n, last_n, two_outputs):
            w0 = w_first + (n - first_n) * k_size
            two_rows(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
        row += 2
    if row < last_row and k_size < LONG_STREAM:
        for n in range(first_n, last_n, one_outputs):
            w0 = w_first + (n - first_n) * k_size
            one_row(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
    elif row < last_row:
        for n in range(first_n, last_n, 4):
            w0 = w_first + (n - first_n) * k_size
            one_long_row(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
