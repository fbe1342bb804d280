"""Dense matrix product on a CPU with AMX whose factors are bfloat16: activations are rounded to it, sums are float32.

One rule for every number of rows: each number of a row is rounded to the nearest bfloat16, ties to even, and products
are added as the instruction adds them (`amx`), 32 inputs at a time, in order. So a row's bits do not depend on how many
rows run with it. They are not those of `bfloat16_cpu`, whose order of weights this has.

Rows are cut into the fewest tiles of at most 16, all of the same size. Where the last tile has fewer rows, it takes in
what lies behind them too (`arrays.READABLE_BYTES`), whose products nobody writes. Rows are rounded straight into the
order that tiles read, by the product before if its gates are all that is between (`Bfloat16Amx.gated`). Codes of
weights are looked up once for all rows of a block. What a block has added is written while the next one multiplies:
gates would take a third of a product's time.

One row alone is no tile: its weights would go by way of the cache, and it waits for nothing but them.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from quant.base import MatrixKernel, PackedWeight
from quant.kernels.amx import HAS_AMX, OUTPUTS, ROWS, TILE_ROWS, configure, release
from quant.kernels.arrays import FAST, LINE_BYTES, call, empty_lines, flat_view, new_output
from quant.kernels.bfloat16_amx_ops import (
    KEPT_STEPS,
    STEP_WEIGHTS,
    multiply_coded_tiles,
    multiply_row,
    multiply_tiles,
)
from quant.kernels.bfloat16_cpu import Bfloat16Cpu
from quant.kernels.bfloat16_ops import INPUTS, LANES, PAIR_WEIGHTS, WEIGHT_BYTES, round_vector
from quant.kernels.coded_ops import PAIR_BYTES, STEP_PAIRS
from quant.kernels.finished_rows_ops import STEP_INPUTS, write_rows
from quant.kernels.work_split import even_block, fetched_part, new_claims, next_piece, tiles_of_piece

ROW_BYTES = 1 << 20
"""Rounded inputs of a stretch that share a reading of a tile's weights: they stay in the L2 cache beside those."""
ROUNDED_EACH = 2
"""Rounded numbers in the memory of a float32, the type of arrays between kernels."""
_RAW_BYTES = STEP_WEIGHTS * WEIGHT_BYTES
BLOCK_TILES = len(ROWS)
"""Row tiles of a block."""


@njit(inline="always")
def _round_tile(x, first, last, k_size, rounded):  # type: ignore[no-untyped-def]
    """Rows of x float32 flat [num_rows, k_size] -> a tile [k_size / 32, rows, 32] of rounded, at the same place."""
    for row in range(first, last):
        target = first * k_size + (row - first) * STEP_INPUTS
        for k in range(0, k_size, STEP_INPUTS):
            for part in range(k, k + STEP_INPUTS, LANES):
                round_vector(x, row * k_size + part, rounded, target + part - k)
            target += (last - first) * STEP_INPUTS


@njit(inline="always")
def _multiply_rows(rounded, w, codes, scratch, bias, out, sums, places, rows, tile, sizes, finished):  # type: ignore[no-untyped-def]
    """Rows times a stretch of a tile: a block for every two tiles of rows.

    `places` are where scratch and sums of this thread begin; `rows` the first row, the one after the last, and how many
    a tile has; `sizes` are gates, width, k_size, first and last input, the stretch's first mark, and whether out is
    rounded. `finished`, a tuple of the fields of `FinishedRows`, are rows that the first block writes; at its end its
    own sums may replace theirs. Returned are those that are left to write.
    """
    coded, tables, raw, marks, _ = codes
    scratch_at, place = places
    start, end, tile_rows = rows
    gates, width, k_size, first, last, mark, is_out_rounded = sizes
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
        next_row = row + tile_rows
        count, next_count = min(tile_rows, end - row), max(min(tile_rows, end - next_row), 0)
        first_row = row * k_size + first * count
        next_rows = next_row * k_size + first * next_count if next_count > 0 else 0
        first_weight = scratch_at if is_coded else first_pair * PAIR_WEIGHTS
        starts = first_row, next_rows, tile_rows, count * STEP_INPUTS, next_count * STEP_INPUTS
        work = *starts, num_steps, first_weight, first == 0, place, ahead, num_lines
        if tile_rows == 1:
            write_rows(sums, bias, out, finished)
            multiply_row(rounded, w, coded, tables, raw, marks, sums, work, tile, first_pair, mark)
        elif is_coded and block == 0:
            mask = KEPT_STEPS - 1 if num_blocks == 1 else -1
            codes_at = tile, first_pair, mark, mask
            multiply_coded_tiles(
                rounded, coded, tables, raw, marks, scratch, bias, out, sums, work, finished, *codes_at
            )
        elif is_coded:
            multiply_tiles(rounded, scratch, coded, bias, out, sums, work, finished)
        else:
            multiply_tiles(rounded, w, w, bias, out, sums, work, finished)
        count = count + next_count if last == k_size else 0
        finished = place, row, count, tile_rows, tile, gates, width, is_out_rounded
        place += block_rows * OUTPUTS
    return finished


@njit(parallel=True, **FAST)
def _product(  # type: ignore[no-untyped-def]
    x, w, codes, bias, out, n_size, gates, width, k_size, inputs_each, is_rounded, is_out_rounded, num_threads
):
    """As `bfloat16_cpu._product`.

    If `is_rounded`, x is bfloat16 as the product before has written it, [row tiles, k_size / 32, rows, 32]; if
    `is_out_rounded`, so is out, of gates alone. Both are float32 by their dtype.
    """
    num_rows = len(x) * (ROUNDED_EACH if is_rounded else 1) // k_size
    tile_rows = even_block(num_rows, TILE_ROWS, 1)
    num_row_tiles = (num_rows + tile_rows - 1) // tile_rows
    if is_rounded:
        rounded = x.view(np.uint16)
    else:
        rounded = empty_lines(num_rows * k_size * 2).view(np.uint16)
        if num_row_tiles == 1:  # a parallel region takes longer to start
            _round_tile(x, 0, num_rows, k_size, rounded)
        else:
            for tile in prange(num_row_tiles):
                _round_tile(x, tile * tile_rows, min(num_rows, (tile + 1) * tile_rows), k_size, rounded)
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
                finished = 0, start, 0, tile_rows, first_tile, gates, width, is_out_rounded
                for tile in range(first_tile, last_tile):
                    for stretch in range(num_stretches):
                        first = stretch * inputs_each
                        last = min(k_size, first + inputs_each)
                        mark = codes.first_marks[tile * num_stretches + stretch] if is_coded else 0
                        sizes = gates, width, k_size, first, last, mark, is_out_rounded
                        finished = _multiply_rows(
                            rounded, w, codes, scratch, bias, out, sums, places, rows, tile, sizes, finished
                        )
                write_rows(sums, bias, out, finished)
        release()


class Bfloat16Amx(Bfloat16Cpu):
    """`x @ weight.T + bias`: x [rows, k] float32, rounded first, weight [n, k] bfloat16 -> [rows, n] float32.

    x may also be what `gated` of such a kernel has written for this one.
    """

    rounding = "AMX" if HAS_AMX else None
    _stretch_unit = STEP_INPUTS

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        reasons = [] if HAS_AMX else ["there is no AMX, or Linux does not give it to this process"]
        if packed.num_inputs % STEP_INPUTS:
            reasons.append(f"input sizes must be a multiple of {STEP_INPUTS}, not {packed.num_inputs}")
        return reasons + Bfloat16Cpu.why_not(packed)

    def gated(self, x: torch.Tensor, reader: MatrixKernel | None = None) -> torch.Tensor:
        """If such a kernel is the reader: bfloat16 [rows, num_gates], which lies as no other kernel would read it."""
        is_out_rounded = isinstance(reader, Bfloat16Amx) and reader._k_size == self.num_gates
        return self._multiply(x, self.num_gates, is_out_rounded=is_out_rounded)

    def _multiply(self, x: torch.Tensor, width: int, *, is_out_rounded: bool = False) -> torch.Tensor:
        is_rounded = x.dtype == torch.bfloat16  # by `gated`, in the order of tiles: all else is float32
        out, flat_out = new_output(x.shape[0], width // ROUNDED_EACH if is_out_rounded else width)
        sizes = self._padded_size, self.num_gates, width, self._k_size, self._inputs_each
        flags = int(is_rounded), int(is_out_rounded)
        flat_x = flat_view(x.view(torch.float32) if is_rounded else x)
        call(_product, flat_x, *self._weights, self._bias, flat_out, *sizes, *flags, self._num_threads)
        return out.view(torch.bfloat16) if is_out_rounded else out
