"""Who of the threads computes which outputs and rows of a matrix product.

A product is tiles of outputs times rows. Cut into units, a tile times some rows, and counted tile by tile, it is split
into as many neighbouring ranges as there are threads, whose lengths differ by one unit at most: whatever the number of
threads, none waits for another one longer than a unit takes. A range is three rectangles: the rest of a tile that
another thread has begun, whole tiles, and the beginning of a tile that another thread goes on with.

Few rows are not cut: what they cost is the reading of a tile's weights.

Of a grouped product every thread computes a range of each matrix's tiles: matrices have different numbers of rows.
"""

from __future__ import annotations

from numba import njit

from quant.kernels.arrays import FAST

NUM_RECTANGLES = 3
MIN_CUT_ROWS = 32
"""Rows below which a tile is one unit."""


@njit(**FAST)
def rectangle(index, thread, num_threads, num_tiles, num_rows, unit_rows):  # type: ignore[no-untyped-def]
    """First tile, tile after the last, first row, row after the last of one of a thread's rectangles; maybe empty."""
    if num_rows < MIN_CUT_ROWS:
        unit_rows = max(num_rows, 1)
    units = max((num_rows + unit_rows - 1) // unit_rows, 1)  # of a tile
    first, last = thread * num_tiles * units // num_threads, (thread + 1) * num_tiles * units // num_threads
    first_tile, first_row = first // units, first % units * unit_rows
    last_tile, last_row = last // units, last % units * unit_rows
    if first_row > 0:
        if index == 0:
            return first_tile, first_tile + 1, first_row, last_row if last_tile == first_tile else num_rows
        first_tile += 1
    if index == 1:
        return first_tile, max(first_tile, last_tile), 0, num_rows
    if index == 2 and last_tile >= first_tile:
        return last_tile, last_tile + 1, 0, last_row
    return 0, 0, 0, 0


@njit(**FAST)
def even_block(num_rows, max_rows, unit_rows):  # type: ignore[no-untyped-def]
    """The size of the fewest blocks of at most `max_rows` rows that are alike: a multiple of `unit_rows`.

    `max_rows` is one, too.
    """
    num_blocks = max((num_rows + max_rows - 1) // max_rows, 1)
    rows = (num_rows + num_blocks - 1) // num_blocks
    return max((rows + unit_rows - 1) // unit_rows, 1) * unit_rows


@njit(**FAST)
def tile_range(index, thread, num_threads, num_tiles):  # type: ignore[no-untyped-def]
    """First tile and tile after the last that a thread computes of a grouped product's matrix `index`.

    Threads take turns at the larger ranges.
    """
    part = (thread + index) % num_threads
    return part * num_tiles // num_threads, (part + 1) * num_tiles // num_threads


@njit(**FAST)
def fetched_part(block, num_blocks):  # type: ignore[no-untyped-def]
    """What of the next tile's weights a block of rows asks for while it reads a tile's: which part, of how many.

    The first block reads a tile from memory and the others from the L2 cache, so that the memory would rest meanwhile.
    The first four blocks share the next tile; those after them ask for what the last of them did.
    """
    parts = 4 if num_blocks >= 4 else 2 if num_blocks >= 2 else 1
    return min(block, parts - 1), parts
