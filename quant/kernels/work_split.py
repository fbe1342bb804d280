"""Who of the threads computes which outputs and rows of a matrix product.

A product is tiles of outputs times rows. Cut into units, a tile times some rows, and counted tile by tile, it is split
into as many neighbouring ranges as there are threads, whose lengths differ by one unit at most: whatever the number of
threads, none waits for another one longer than a unit takes. A range is three rectangles: the rest of a tile that
another thread has begun, whole tiles, and the beginning of a tile that another thread goes on with.

Few rows are not cut: what they cost is the reading of a tile's weights.

Threads are not equally quick: another process takes a processor for a while, or processors differ. So whole tiles are
claimed piece by piece, and a thread that has none left claims what another one has not begun: it waits for a piece, or
for the other's cut tiles, at most. Which thread computes a piece changes no bit of it.

Of a grouped product every thread computes a range of each matrix's tiles: matrices have different numbers of rows.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.arrays import FAST, LINE_BYTES
from quant.kernels.simd import array_data

REST, WHOLE, BEGINNING = 0, 1, 2
"""A thread's rectangles."""
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
def _add_one_below(typing_context, counts, place, limit):  # type: ignore[no-untyped-def]
    """Add 1 to a number of an int64 array if it is below `limit`, in one step for all threads; returns what it was.

    Threads that come at once may bring it above the limit.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        at, limit = b.gep(array_data(context, b, signature, args, 0), [args[1]]), args[2]
        seen = b.load_atomic(at, "monotonic", 8)
        result = cgutils.alloca_once_value(b, seen)
        # Reading alone lets all threads have a copy of a number that has reached its limit.
        with b.if_then(b.icmp_signed("<", seen, limit)):
            b.store(b.atomic_rmw("add", at, ir.Constant(seen.type, 1), "monotonic"), result)
        return b.load(result)

    return types.int64(counts, types.intp, types.int64), codegen


@njit(**FAST)
def new_claims(num_threads):  # type: ignore[no-untyped-def]
    """The pieces of each thread's work that were claimed, none yet: int64, a cache line for each."""
    return np.zeros(num_threads * _CLAIM_SPACING, np.int64)


@njit(**FAST)
def claim(claims, owner, num_pieces):  # type: ignore[no-untyped-def]
    """The number of the next of thread `owner`'s pieces, now the caller's; `num_pieces` or more: none is left."""
    return _add_one_below(claims, owner * _CLAIM_SPACING, num_pieces)


@njit(**FAST)
def tiles_of_piece(tile_weights, num_rows, row_block):  # type: ignore[no-untyped-def]
    """The number of tiles, of so many weights each, that are claimed together."""
    return max(PIECE_PRODUCTS // (tile_weights * max(min(num_rows, row_block), MIN_PIECE_ROWS)), 1)


@njit(**FAST)
def next_piece(claims, thread, turn, num_threads, num_tiles, num_rows, unit_rows, row_block, tiles_each):  # type: ignore[no-untyped-def]
    """The next piece for a thread: turn, first tile, tile after the last, first row, row after the last; maybe empty.

    `turn` is 0 at first and then the one returned, which is below 0 where nothing is left. At 0 and 1 a piece is one of
    the thread's cut tiles, then it is of whole tiles: at 2 its own, at 3 those of the thread after it, and so on. Those
    pieces have `tiles_each` tiles and `row_block` rows at most.
    """
    if turn < 2:
        first_tile, last_tile, first_row, last_row = rectangle(
            REST if turn == 0 else BEGINNING, thread, num_threads, num_tiles, num_rows, unit_rows
        )
        return turn + 1, first_tile, last_tile, first_row, last_row
    rows_each = even_block(num_rows, row_block, unit_rows)
    num_blocks = (num_rows + rows_each - 1) // rows_each
    for place in range(turn - 2, num_threads):
        owner = (thread + place) % num_threads
        first_tile, last_tile, _, _ = rectangle(WHOLE, owner, num_threads, num_tiles, num_rows, unit_rows)
        pieces_each = (last_tile - first_tile + tiles_each - 1) // tiles_each  # of a block of rows
        number = claim(claims, owner, pieces_each * num_blocks)
        if number < pieces_each * num_blocks:
            first_tile += number % pieces_each * tiles_each
            last_tile = min(last_tile, first_tile + tiles_each)
            first_row = number // pieces_each * rows_each
            return place + 2, first_tile, last_tile, first_row, min(num_rows, first_row + rows_each)
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
        if index == REST:
            return first_tile, first_tile + 1, first_row, last_row if last_tile == first_tile else num_rows
        first_tile += 1
    if index == WHOLE:
        return first_tile, max(first_tile, last_tile), 0, num_rows
    if index == BEGINNING and last_tile >= first_tile:
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
