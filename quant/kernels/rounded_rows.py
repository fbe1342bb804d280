"""Rows of activations rounded to 8 bits, group by group, in the order in which a product on a CPU reads them.

Integers are int8 [rows, inputs], scales float32 and their sums int32 [rows, groups]. Tiles of AMX read fewer lines of
the cache in another order: integers [row tiles, inputs / 64, rows of the tile, 64], scales and sums [groups, rows].
Tiles have 16 rows, the last one what is left. Threads that round different groups of a row share hardly a line then.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from quant.kernels.amx import STEP_BYTES, TILE_ROWS
from quant.kernels.arrays import LINE_BYTES, empty_lines
from quant.kernels.integer_ops import make_round_group
from quant.kernels.simd import HAS_AVX512

MIN_AMX_ROWS = 32
"""Rows from which AMX is quicker: fewer wait for weights, which its instructions ask for less evenly."""
MIN_PARALLEL_ROWS = 8 if HAS_AVX512 else 4
"""Fewer are rounded by one thread: a parallel region takes longer to start."""
round_group = make_round_group(16 if HAS_AVX512 else 8)


@njit(inline="always")
def tile_step(row, num_rows):  # type: ignore[no-untyped-def]
    """The bytes of 64 inputs of the tile that begins with this one of so many rows; 0 if there is none."""
    return max(min(TILE_ROWS, num_rows - row), 0) * STEP_BYTES


@njit(inline="always")
def round_into_tile(x, place, row, column, num_rows, k_size, group, integers, scales, sums):  # type: ignore[no-untyped-def]
    """Round the group at `place` of x, which are a row's inputs from `column` on, into the order of tiles."""
    first = row // TILE_ROWS * TILE_ROWS
    step = tile_step(first, num_rows)
    to = first * k_size + column // STEP_BYTES * step + (row - first) * STEP_BYTES
    round_group(x, place, group, integers, to, step, scales, sums, column // group * num_rows + row)


@njit(inline="always")
def rounded_parts(memory, num_rows, k_size, group):  # type: ignore[no-untyped-def]
    """Where integers, scales and sums of so many rows lie in memory float32 that has room for the rows themselves."""
    first, last = num_rows * k_size // 4, num_rows * k_size // 4 + num_rows * (k_size // group)
    sums = memory[last : 2 * last - first]
    return memory.view(np.int8), memory[first:last], sums.view(np.int32)


@njit(inline="always")
def round_rows(x, num_rows, k_size, group, is_tiled):  # type: ignore[no-untyped-def]
    """Round rows, within a parallel function: integers, scales and sums.

    Behind many rows' integers that are not tiled lie 16 rows that a tile may read, whose products nobody takes.
    """
    num_x_groups = k_size // group
    num_groups = num_rows * num_x_groups
    num_behind = TILE_ROWS if num_rows >= MIN_AMX_ROWS and not is_tiled else 0
    x8 = empty_lines((num_rows + num_behind) * k_size).view(np.int8)
    x_scales = np.empty(num_groups, np.float32)
    x_sums = np.empty(num_groups, np.int32)
    if num_rows < MIN_PARALLEL_ROWS and not is_tiled:
        for g in range(num_groups):
            round_group(x, g * group, group, x8, g * group, LINE_BYTES, x_scales, x_sums, g)
    else:
        for g in prange(num_groups):
            if is_tiled:
                row, column = g // num_x_groups, g % num_x_groups * group
                round_into_tile(x, g * group, row, column, num_rows, k_size, group, x8, x_scales, x_sums)
            else:
                round_group(x, g * group, group, x8, g * group, LINE_BYTES, x_scales, x_sums, g)
    return x8, x_scales, x_sums
