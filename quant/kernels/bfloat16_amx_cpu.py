"""Dense matrix product on a CPU with AMX whose factors are bfloat16: activations are rounded to it, sums are float32.

One rule for every number of rows: each number of a row is rounded to the nearest bfloat16, ties to even, and products
are added as the instruction adds them (`amx`), 32 inputs at a time, in order. So a row's bits do not depend on how many
rows run with it. They are not those of `bfloat16_cpu`, whose order of weights this has.

Rows are cut into the fewest tiles of at most 16, all of the same size. Where the last tile has fewer rows, the rest are
multiplied and not written. Rows are rounded straight into the order that tiles read. Codes of weights are looked up
once for all rows of a block.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from quant.base import PackedWeight
from quant.kernels.amx import HAS_AMX, OUTPUTS, ROWS, TILE_ROWS, configure, release
from quant.kernels.arrays import FAST, LINE_BYTES, empty_lines
from quant.kernels.bfloat16_amx_ops import (
    KEPT_STEPS,
    STEP_INPUTS,
    STEP_PAIRS,
    STEP_WEIGHTS,
    multiply_coded_tiles,
    multiply_tiles,
    write_rows,
)
from quant.kernels.bfloat16_cpu import Bfloat16Cpu
from quant.kernels.bfloat16_ops import INPUTS, LANES, PAIR_WEIGHTS, WEIGHT_BYTES, round_vector
from quant.kernels.coded_ops import PAIR_BYTES
from quant.kernels.work_split import even_block, fetched_part, new_claims, next_piece, tiles_of_piece

ROW_BYTES = 1 << 20
"""Rounded inputs of a stretch that share a reading of a tile's weights: they stay in the L2 cache beside those."""
_RAW_BYTES = STEP_WEIGHTS * WEIGHT_BYTES
BLOCK_TILES = len(ROWS)
"""Row tiles of a block."""


@njit(inline="always")
def _round_tile(x, tile, tile_rows, num_rows, k_size, rounded):  # type: ignore[no-untyped-def]
    """x float32 flat [num_rows, k_size] -> tile `tile` of rounded [row tiles, k_size / 32, tile_rows, 32]."""
    first = tile * tile_rows
    for row in range(first, min(num_rows, first + tile_rows)):
        target = first * k_size + (row - first) * STEP_INPUTS
        for k in range(0, k_size, STEP_INPUTS):
            for part in range(k, k + STEP_INPUTS, LANES):
                round_vector(x, row * k_size + part, rounded, target + part - k)
            target += tile_rows * STEP_INPUTS


@njit(inline="always")
def _multiply_rows(rounded, w, codes, scratch, bias, out, sums, places, rows, tile, sizes):  # type: ignore[no-untyped-def]
    """Rows times a stretch of a tile: a block for every two tiles of rows.

    `places` are where scratch and sums of this thread begin; `rows` the first row, the one after the last, and how many
    a tile has; `sizes` are gates, width, k_size, first and last input, and the stretch's first mark.
    """
    coded, tables, raw, marks, _ = codes
    scratch_at, place = places
    start, end, tile_rows = rows
    gates, width, k_size, first, last, mark = sizes
    is_coded = len(coded) > 0
    num_steps, first_pair = (last - first) // STEP_INPUTS, (tile * k_size + first) // INPUTS
    step_bytes = STEP_PAIRS * PAIR_BYTES if is_coded else _RAW_BYTES
    first_byte, block_rows = first_pair // STEP_PAIRS * step_bytes, BLOCK_TILES * tile_rows
    num_blocks = (end - start + block_rows - 1) // block_rows
    for block in range(num_blocks):
        row = start + block * block_rows
        part, parts = fetched_part(block, num_blocks)
        num_lines = step_bytes // LINE_BYTES // parts if block < parts else 0
        ahead = first_byte + num_steps * step_bytes + part * num_steps * (step_bytes // parts)
        next_rows = tile_rows * k_size if row + tile_rows < end else 0
        first_row = row * k_size + first * tile_rows
        first_weight = scratch_at if is_coded else first_pair * PAIR_WEIGHTS
        work = first_row, next_rows, tile_rows, num_steps, first_weight, first == 0, place, ahead, num_lines
        if is_coded and block == 0:
            mask = KEPT_STEPS - 1 if num_blocks == 1 else -1
            multiply_coded_tiles(rounded, coded, tables, raw, marks, scratch, sums, work, tile, first_pair, mark, mask)
        elif is_coded:
            multiply_tiles(rounded, scratch, coded, sums, work)
        else:
            multiply_tiles(rounded, w, w, sums, work)
        if last == k_size:
            write_rows(sums, place, bias, out, row, min(block_rows, end - row), tile, gates, width)
        place += block_rows * OUTPUTS


@njit(parallel=True, **FAST)
def _product(x, w, codes, bias, out, n_size, gates, width, k_size, inputs_each, num_threads):  # type: ignore[no-untyped-def]
    """As `bfloat16_cpu._product`."""
    num_rows = len(x) // k_size
    tile_rows = even_block(num_rows, TILE_ROWS, 1)
    num_row_tiles = (num_rows + tile_rows - 1) // tile_rows
    rounded = empty_lines(num_row_tiles * tile_rows * k_size * 2).view(np.uint16)
    if num_row_tiles == 1:  # a parallel region takes longer to start
        _round_tile(x, 0, tile_rows, num_rows, k_size, rounded)
    else:
        for tile in prange(num_row_tiles):
            _round_tile(x, tile, tile_rows, num_rows, k_size, rounded)
    unit_rows = tile_rows * max(1, min(num_row_tiles, BLOCK_TILES))
    row_block = max(ROW_BYTES // (inputs_each * WEIGHT_BYTES * unit_rows), 1) * unit_rows
    num_stretches = (k_size + inputs_each - 1) // inputs_each
    sums_each = even_block(min(num_rows, row_block), row_block, BLOCK_TILES * tile_rows) * OUTPUTS
    sums = empty_lines(num_threads * sums_each * 4).view(np.float32)
    is_coded = len(codes.coded) > 0
    steps_each = (inputs_each + STEP_INPUTS - 1) // STEP_INPUTS if num_row_tiles > BLOCK_TILES else KEPT_STEPS
    scratch_each = steps_each * STEP_WEIGHTS if is_coded else 0
    scratch = empty_lines(num_threads * scratch_each * 2).view(np.uint16)
    claims, tiles_each = new_claims(num_threads), tiles_of_piece(OUTPUTS * k_size, num_rows, row_block)
    for thread in prange(num_threads):
        configure(tile_rows)
        places, turn = (thread * scratch_each, thread * sums_each), 0
        while turn >= 0:
            turn, first_tile, last_tile, first_row, end = next_piece(
                claims, thread, turn, num_threads, n_size // OUTPUTS, num_rows, unit_rows, row_block, tiles_each
            )
            even = even_block(end - first_row, row_block, unit_rows)
            for start in range(first_row, end, even):
                rows = start, min(end, start + even), tile_rows
                for tile in range(first_tile, last_tile):
                    for stretch in range(num_stretches):
                        first = stretch * inputs_each
                        last = min(k_size, first + inputs_each)
                        mark = codes.first_marks[tile * num_stretches + stretch] if is_coded else 0
                        sizes = gates, width, k_size, first, last, mark
                        _multiply_rows(rounded, w, codes, scratch, bias, out, sums, places, rows, tile, sizes)
        release()


class Bfloat16Amx(Bfloat16Cpu):
    """`x @ weight.T + bias`: x [rows, k] float32, rounded first, weight [n, k] bfloat16 -> [rows, n] float32."""

    rounding = "AMX" if HAS_AMX else None
    _kernel = staticmethod(_product)
    _stretch_unit = STEP_INPUTS

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        reasons = [] if HAS_AMX else ["there is no AMX, or Linux does not give it to this process"]
        if packed.num_inputs % STEP_INPUTS:
            reasons.append(f"input sizes must be a multiple of {STEP_INPUTS}, not {packed.num_inputs}")
        return reasons + Bfloat16Cpu.why_not(packed)
