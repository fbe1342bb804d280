"""The products of `integer_cpu` by AMX, with the same bits: many rows times tiles of outputs, and what becomes of them.

A block's rows are written while the next one is multiplied: their lines come from far away. Gates that the next product
takes rounded (`rounded_rows`) stay in the L2 cache until a group of them is done, and leave it in a quarter of the
bytes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quant.kernels.amx import LANES, OUTPUTS, ROWS, STEP_BYTES, TILE_ROWS, configure, release
from quant.kernels.arrays import FAST, LINE_BYTES, empty_lines
from quant.kernels.integer_amx_ops import has_packed_weights, multiply_group, scale_totals, unpack_tile, write_sums
from quant.kernels.rounded_rows import round_into_tile, tile_step

AMX_BLOCK = 64
"""Rows whose sums wait in the L1 cache for the next group's weights."""
_TILE_PAIR = len(ROWS) * TILE_ROWS
"""Rows that share a group's weights in tiles."""
MIN_ROUNDED_ROWS = 2 * AMX_BLOCK
"""Rows from which gates are rounded. For fewer, whose gates stay in the caches anyway, it is as quick without."""
_GROUPS_EACH = 4
"""Groups of gates of a block that each thread has at least, so that none waits long for one that has a group more."""


@njit(inline="always")
def rounds_gates(num_rows, min_rows, num_groups, num_threads):  # type: ignore[no-untyped-def]
    """Whether a product that may round gates, so many groups of them, does so; `min_rows` are those of AMX."""
    num_units = (num_rows + AMX_BLOCK - 1) // AMX_BLOCK * num_groups
    return num_rows >= max(min_rows, MIN_ROUNDED_ROWS) and num_units >= _GROUPS_EACH * num_threads


@njit(inline="always")
def _tile_places(row, num_rows, k_size, column, is_tiled):  # type: ignore[no-untyped-def]
    """Where rows' inputs begin from `column` on, and how far behind 64 inputs are the next: of two row tiles each."""
    steps, begin = (STEP_BYTES, STEP_BYTES), row * k_size
    if is_tiled:
        steps = tile_step(row, num_rows), tile_step(row + TILE_ROWS, num_rows)
    g_step = column // STEP_BYTES
    return (begin + g_step * steps[0], begin + TILE_ROWS * k_size + g_step * steps[1]), steps


@njit(inline="always")
def _share_of_lines(lines, part, parts):  # type: ignore[no-untyped-def]
    """First byte and number of lines of one of so many parts of lines, which are the first's number and the count."""
    begin, end = lines[1] * part // parts, lines[1] * (part + 1) // parts
    return (lines[0] + begin) * LINE_BYTES, end - begin


@njit(inline="always")
def _round_gates(rows, num_rows, gates, column, gates_each, waiting, integers, x_scales, x_sums):  # type: ignore[no-untyped-def]
    """Round the group of gates from `column` on, in some of the `num_rows` of out.

    `rows` are the first and the one after the last, and the one with which `waiting`, [rows, gates_each], begins.
    Arrays are arguments of their own: taken out of a tuple in a loop, their users would be counted each time.
    """
    for row in range(rows[0], rows[1]):
        place = (row - rows[2]) * gates_each
        round_into_tile(waiting, place, row, column, num_rows, gates, gates_each, integers, x_scales, x_sums)


@njit(**FAST)
def multiply_row_tiles(  # type: ignore[no-untyped-def]
    x,
    x_scales,
    x_sums,
    rows,
    group,
    w,
    scales,
    zeros,
    groups,
    bias,
    out,
    tiles,
    gates,
    width,
    k_size,
    is_tiled,
    rounding,
):
    """As `integer_cpu.multiply_rows`; if x `is_tiled`, it is as `rounded_rows` puts it for tiles.

    `rounding` says where gates go that are rounded: how many are a group, 0 if out gets float32; memory float32 [rows,
    group] for the rows of this call; where integers, scales and sums of the whole out begin. If gates are rounded,
    `tiles` are those of whole groups, and the rows begin with a row tile.
    """
    totals = empty_lines(2 * _TILE_PAIR * OUTPUTS * 4).view(np.int32)
    block_size = AMX_BLOCK * OUTPUTS
    sums = empty_lines((2 * block_size + OUTPUTS) * 4).view(np.float32)
    no_sums, place = 2 * block_size, 0
    sums[no_sums:] = 0
    num_x_groups, tile_weights, num_written = k_size // group, k_size * OUTPUTS, 0
    num_rows = len(x_scales) // num_x_groups
    done = block_size, 0, 0, 0  # a block: place of its sums, tile, first row, number of rows
    next_total, total_rows = 0, (0, 0, 0, 0, 0, 0, 0, 0, 0)
    is_packed = has_packed_weights(w)
    unpacked = empty_lines(tile_weights if is_packed else 0)
    weights = unpacked if is_packed else w.view(np.uint8)
    num_lines = group * OUTPUTS // (2 if is_packed else 1) // LINE_BYTES
    stride = STEP_BYTES if is_tiled else k_size
    gates_each, waiting, integers, out_scales, out_sums = rounding
    target, next_row = (out, width) if gates_each == 0 else (waiting, gates_each)
    column, shift, ends_group = 0, 0, False
    configure(TILE_ROWS)
    for tile in range(tiles[0], tiles[1]):
        first_weight = tile * tile_weights
        if is_packed:
            unpack_tile(w, first_weight // 2, tile_weights // 2, unpacked)
            first_weight = 0
        for first in range(rows[0], rows[1], AMX_BLOCK):
            count = min(AMX_BLOCK, rows[1] - first)
            num_pairs = (count + _TILE_PAIR - 1) // _TILE_PAIR
            num_products = num_x_groups * num_pairs
            rows_each = (done[3] + num_products - 1) // num_products
            for g in range(num_x_groups):
                group_place = g * groups // num_x_groups * LANES
                unit_places = tile * OUTPUTS * groups + group_place, (tile * OUTPUTS + LANES) * groups + group_place
                for row in range(0, count, _TILE_PAIR):
                    num_tiles = min(len(ROWS), (count - row + TILE_ROWS - 1) // TILE_ROWS)
                    starts, steps = _tile_places(first + row, num_rows, k_size, g * group, is_tiled)
                    x_rows = starts, steps, stride, num_tiles
                    # The first of a block scale the last totals of the block before, and may write its rows meanwhile:
                    # half of them are rows whose totals were scaled before, or are the half that is scaled first.
                    num_now = min(rows_each, done[3] - num_written)
                    summed_rows = done + (num_written, num_now, gates, width, next_row, shift)
                    ahead = ((tile + 1) * num_x_groups + g) * num_lines, num_lines if first == rows[0] else 0
                    lines = _share_of_lines(ahead, row // _TILE_PAIR, num_pairs)
                    products = weights, first_weight + g * group * OUTPUTS, group, totals, next_total
                    scaling = total_rows, x_scales, x_sums, scales, zeros, sums
                    multiply_group(x, *x_rows, *products, *scaling, summed_rows, bias, target, w, lines)
                    if ends_group:
                        first_row = done[2] + num_written
                        now = first_row, first_row + num_now, rows[0]
                        _round_gates(now, num_rows, gates, column, gates_each, waiting, integers, out_scales, out_sums)
                    num_written += num_now
                    x_at = (g * num_rows, 1) if is_tiled else (g, num_x_groups)
                    to = place + row * OUTPUTS
                    before = (no_sums, 0) if g == 0 else (to, OUTPUTS)
                    x_place = x_at[0] + (first + row) * x_at[1]
                    total_rows = (
                        (next_total, min(_TILE_PAIR, count - row), x_place, x_at[1]) + unit_places + before + (to,)
                    )
                    next_total = _TILE_PAIR * OUTPUTS - next_total
            done, num_written = (place, tile, first, count), 0
            column = tile * LANES // max(gates_each, 1) * gates_each
            shift, ends_group = -rows[0] * gates_each - column, (tile + 1) * LANES == column + gates_each
            place = block_size - place
    scale_totals(totals, total_rows, x_scales, x_sums, scales, zeros, sums)
    write_sums(sums, done + (0, done[3], gates, width, next_row, shift), scales, bias, target)
    if ends_group:
        now = done[2], done[2] + done[3], rows[0]
        _round_gates(now, num_rows, gates, column, gates_each, waiting, integers, out_scales, out_sums)
    release()
