"""Scores and weighted values of a span, 64 keys, for all rows of a work item of `attend_cpu`: cut into tiles of rows.

A table is the first block of a head, the sequence's blocks, and where those end that will be used.
"""

from __future__ import annotations

from numba import njit

from engine.attention.attend_amx_ops import MAX_TILES, copy_values, score_tiles, sum_tiles
from engine.attention.attend_ops import BLOCK_SIZE, LANES, SPAN, make_scores, make_sums, numbers_together
from quant.kernels.simd import HAS_AVX512

# Up to 24 of the 32 registers of AVX-512 hold sums. Elsewhere 16 lanes of four rows take eight of 16.
_score4, _score8, _score12 = (make_scores(rows, 1) for rows in (4, 8, 12))
_score4_twice, _score8_twice, _score12_twice = (make_scores(rows, 2) for rows in (4, 8, 12))
_sum4, _sum4_twice, _sum8_twice, _sum12_twice = (make_sums(*shape) for shape in ((4, 1), (4, 2), (8, 2), (12, 2)))


@njit(inline="always")
def _tile_rows(num_rows):  # type: ignore[no-untyped-def]
    """Rows of the next tile if so many are left, a multiple of 4: tiles of 4 are slow, so only 4 become one."""
    if not HAS_AVX512 or num_rows == 4:
        return 4
    return 12 if num_rows == 12 or num_rows >= 20 else 8


@njit(inline="always")
def _score_rows(four, eight, twelve, q, num_rows, head_dim, keys, table, index, scores, column):  # type: ignore[no-untyped-def]
    """Scores of all rows, a multiple of 4, against the keys of block `index` or two, the span's from `column` on.

    `four`, and for AVX-512 alone `eight` and `twelve`, are the tiles of so many rows.
    """
    first_of_head, blocks, last = table
    row = 0
    while row < num_rows:
        rows, target = _tile_rows(num_rows - row), row * SPAN + column
        if HAS_AVX512 and rows == 12:
            twelve(q, row, num_rows, head_dim, keys, first_of_head, blocks, index, last, scores, target)
        elif HAS_AVX512 and rows == 8:
            eight(q, row, num_rows, head_dim, keys, first_of_head, blocks, index, last, scores, target)
        else:
            four(q, row, num_rows, head_dim, keys, first_of_head, blocks, index, last, scores, target)
        row += rows


@njit(inline="always")
def _sum_rows(tile, width, row, scores, column, num_keys, head_dim, values, table, begin, end, sums):  # type: ignore[no-untyped-def]
    """Let a tile of some rows, from `row` on, and `width` dimensions add to all dimensions of its rows."""
    first_of_head, blocks, last = table
    place = row * SPAN + column // numbers_together(values)
    for d in range(0, head_dim, width):
        target = row * head_dim + d
        tile(scores, place, num_keys, head_dim, values, first_of_head, blocks, begin, end, last, d, sums, target)


@njit(inline="always")
def sum_span(scores, column, num_rows, num_keys, head_dim, values, table, begin, end, sums):  # type: ignore[no-untyped-def]
    """Add the weighted values of blocks `begin : end` to the sums of all rows, flat [num_rows, head_dim]."""
    row = 0
    while row < num_rows:
        rows = _tile_rows(num_rows - row)
        if not HAS_AVX512 or head_dim % (2 * LANES):
            rows = 4
            _sum_rows(_sum4, LANES, row, scores, column, num_keys, head_dim, values, table, begin, end, sums)
        elif rows == 12:
            _sum_rows(_sum12_twice, 2 * LANES, row, scores, column, num_keys, head_dim, values, table, begin, end, sums)
        elif rows == 8:
            _sum_rows(_sum8_twice, 2 * LANES, row, scores, column, num_keys, head_dim, values, table, begin, end, sums)
        else:
            _sum_rows(_sum4_twice, 2 * LANES, row, scores, column, num_keys, head_dim, values, table, begin, end, sums)
        row += rows


@njit(inline="always")
def score_span(q, num_rows, head_dim, keys, table, begin, end, span, scores):  # type: ignore[no-untyped-def]
    """Scores of all rows, a multiple of 4, against the keys of blocks `begin : end` of a span."""
    index = begin
    while HAS_AVX512 and index + 2 <= end:
        column = (index - span) * BLOCK_SIZE
        _score_rows(
            _score4_twice, _score8_twice, _score12_twice, q, num_rows, head_dim, keys, table, index, scores, column
        )
        index += 2
    while index < end:
        column = (index - span) * BLOCK_SIZE
        _score_rows(_score4, _score8, _score12, q, num_rows, head_dim, keys, table, index, scores, column)
        index += 1


@njit(inline="always")
def score_span_amx(q, num_rows, tile_rows, head_dim, keys, table, begin, end, span, scores):  # type: ignore[no-untyped-def]
    """`score_span` by AMX, in tiles of so many rows."""
    first_of_head, blocks, last = table
    for row in range(0, num_rows, MAX_TILES * tile_rows):
        count = min(MAX_TILES, (num_rows - row + tile_rows - 1) // tile_rows)
        tiles = q, row, count, tile_rows, head_dim
        for index in range(begin, end, MAX_TILES):
            column, num_blocks = (index - span) * BLOCK_SIZE, min(MAX_TILES, end - index)
            score_tiles(*tiles, keys, first_of_head, blocks, index, num_blocks, last, scores, column)


@njit(inline="always")
def sum_span_amx(scratch, num_rows, tile_rows, num_keys, head_dim, values, table, begin, end, sums):  # type: ignore[no-untyped-def]
    """`sum_span` by AMX."""
    first_of_head, blocks, _ = table
    copy_values(values, first_of_head, blocks, begin, end, num_keys, head_dim, scratch.values)
    for row in range(0, num_rows, MAX_TILES * tile_rows):
        count = min(MAX_TILES, (num_rows - row + tile_rows - 1) // tile_rows)
        sum_tiles(scratch.scores, row, count, tile_rows, head_dim, scratch.values, sums)
