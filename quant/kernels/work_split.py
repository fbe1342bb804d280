"""Who of the threads computes which outputs and rows of a matrix product.

A product is tiles of outputs times rows. Cut into units, a tile times some rows, and counted tile by tile, it is split
into as many neighbouring ranges as there are threads, whose lengths differ by one unit at most: whatever the number of
threads, none waits for another one longer than a unit takes. A range is three rectangles: the rest of a tile that
another thread has begun, whole tiles, and the beginning of a tile that another thread goes on with.

Few rows are not cut: what they cost is the reading of a tile's weights.

Threads are not equally quick: another process takes a processor for a while, or processors differ. So whole tiles are
claimed piece by piece, and who has none left claims what another one has not begun. Which thread computes a piece
changes no bit of it.

Of a grouped product every thread computes a range of each matrix's tiles: matrices have different numbers of rows.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from quant.kernels.arrays import FAST, LINE_BYTES
from quant.kernels.simd import array_data

NUM_RECTANGLES = 3
MIN_CUT_ROWS = 32
"""Rows below which a tile is one unit."""
PIECE_PRODUCTS = 1 << 22
"""Multiplications of a piece, about 20 us: a claim takes 0.1."""
MIN_PIECE_ROWS = 8
"""Fewer rows wait for a tile's weights as long as so many take to multiply with them."""
_CLAIM_SPACING = LINE_BYTES // 8
"""Places from one thread's number of claims to the next, which so has a cache line of its own."""


@intrinsic
def _add_one(typing_context, counts, place):  # type: ignore[no-untyped-def]
    """Add 1 to a number of an int64 array, in one step for all threads; returns what it was."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        at = b.gep(array_data(context, b, signature, args, 0), [args[1]])
        return b.atomic_rmw("add", at, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counts, types.intp), codegen


@njit(**FAST)
def new_claims(num_threads):  # type: ignore[no-untyped-def]
    """How much of each thread's work was claimed: nothing yet."""
    return np.zeros(num_threads * _CLAIM_SPACING, np.int64)


@njit(**FAST)
def claim(claims, owner):  # type: ignore[no-untyped-def]
    """The number of the next piece of the work of thread `owner`: it is the caller's, if there are so many."""
    return _add_one(claims, owner * _CLAIM_SPACING)


@njit(**FAST)
def tiles_of_piece(tile_weights, num_rows, row_block):  # type: ignore[no-untyped-def]
    """How many tiles of so many weights are claimed together."""
    return max(PIECE_PRODUCTS // (tile_weights * max(min(num_rows, row_block), MIN_PIECE_ROWS)), 1)


@njit(**FAST)
def next_piece(claims, thread, turn, num_threads, num_tiles, num_rows, unit_rows, row_block, tiles_each):  # type: ignore[no-untyped-def]
    """What a thread computes next: turn, first tile, tile after the last, first row, row after the last; maybe empty.

    `turn` is 0 at first and then the one returned, which is below 0 where nothing is left. A thread computes its tiles
    that are not whole, then its own whole ones, and then those of the threads after it, up to `row_block` rows of
    `tiles_each` tiles at a time.
    """
    if turn < 2:
        first_tile, last_tile, first_row, last_row = rectangle(
            2 * turn, thread, num_threads, num_tiles, num_rows, unit_rows
        )
        return turn + 1, first_tile, last_tile, first_row, last_row
    rows_each = even_block(num_rows, row_block, unit_rows)
    num_blocks = (num_rows + rows_each - 1) // rows_each
    for place in range(turn - 2, num_threads):
        owner = (thread + place) % num_threads
        first_tile, last_tile, _, _ = rectangle(1, owner, num_threads, num_tiles, num_rows, unit_rows)
        num_pieces = (last_tile - first_tile + tiles_each - 1) // tiles_each
        number = claim(claims, owner)
        if number < num_pieces * num_blocks:
            first_tile += number % num_pieces * tiles_each
            first_row = number // num_pieces * rows_each
            return (
                place + 2,
                first_tile,
                min(last_tile, first_tile + tiles_each),
                first_row,
                min(num_rows, first_row + rows_each),
            )
    return -1, 0, 0, 0, 0


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
