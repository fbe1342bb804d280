"""Matrix products of 8- and 4-bit weights with activations rounded to 8 bits, on a CPU: integer sums, float32 scales.

One rule for every number of rows (its reference implementation is `rounded_torch`): each group of inputs of a row (128,
64 or 32) is divided by its largest magnitude over 127 and rounded to the nearest integer. Sums within a group are
integers, so they are exact; groups are added in order. A row's bits therefore do not depend on the rest of the batch.

The instruction set is chosen once (`integer_ops`); from `MIN_AMX_ROWS` rows on AMX multiplies, with the same bits.
Where the machine has none of them, and with `--dtype float32`, `packed_cpu` multiplies in float32 instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, prange

from quant.base import MatrixKernel, PackedWeight
from quant.kernels.amx import COMPILES_AMX, HAS_AMX, LANES, STEP_BYTES, TILE_ROWS, configure, release
from quant.kernels.amx import ROWS as ROW_TILES
from quant.kernels.arrays import FAST, LINE_BYTES, call, empty_lines, flat_view, new_output, new_weight
from quant.kernels.gates_ops import count_gates, gate_order
from quant.kernels.integer_amx_ops import (
    GROUP_SIZES,
    has_packed_weights,
    multiply_group,
    scale_totals,
    unpack_tile,
    write_scaled,
)
from quant.kernels.integer_ops import (
    INPUTS,
    INSTRUCTIONS,
    Instructions,
    find_instructions,
    make_round_group,
    make_tile,
)
from quant.kernels.padding_cpu import padded, without_padding
from quant.kernels.rounded_torch import GROUPS, activation_group
from quant.kernels.simd import HAS_AVX512
from quant.kernels.work_split import even_block, fetched_part, new_claims, next_piece, tiles_of_piece
from quant.packing import unpack_nibbles

ROW_BLOCK = 512
"""Rows that share a reading of a tile's weights, which stay in the L2 cache; activations come from the L3 in time."""
AMX_ROW_BYTES = 768 << 10
"""Activations that share a reading of a tile's weights by AMX. They stay in the L2 cache: the L3 is too slow for it."""

FOUND = find_instructions()
ISA = FOUND or INSTRUCTIONS[-1]
OUTPUTS = ISA.units * ISA.lanes
"""Outputs per parallel item."""
SHIFT = 0 if ISA.is_signed else 128
"""Added to weights of 8 bits, which the instruction takes for unsigned, and to their zero points."""
ROWS_AT_A_TIME = 128 * OUTPUTS
"""Outputs that are put into the kernel's order together: bounds the memory for copies."""


MIN_AMX_ROWS = 32
"""Rows from which AMX is quicker: fewer wait for weights, which its instructions ask for less evenly."""
NO_ROWS = 1 << 40
"""A number of rows that no product has."""
AMX_BLOCK = 64
"""Rows whose totals and sums wait in the L1 cache for the next group's weights."""
TILE_PAIR = len(ROW_TILES) * TILE_ROWS
"""Rows that share a group's weights in tiles."""
ROWS = ISA.rows
multiply_first_rows, multiply_many_rows = make_tile(ISA, ROWS), make_tile(ISA, ROWS, is_fetching=False)
multiply_half_rows = make_tile(ISA, ROWS // 2)
multiply_two_rows, multiply_one_row = make_tile(ISA, 2), make_tile(ISA, 1)
round_group = make_round_group(16 if HAS_AVX512 else 8)


@njit(**FAST)
def _multiply_row_tiles(  # type: ignore[no-untyped-def]
    x, x_scales, x_sums, rows, group, w, scales, zeros, groups, bias, out, tiles, gates, width, k_size, is_tiled
):
    """`multiply_rows` by AMX.

    A block's rows are written while the next one is multiplied: their lines come from far away.
    """
    totals = empty_lines(AMX_BLOCK * OUTPUTS * 4).view(np.int32)
    sums, place = empty_lines(2 * AMX_BLOCK * OUTPUTS * 4).view(np.float32), 0
    num_x_groups, tile_weights, num_written = k_size // group, k_size * OUTPUTS, 0
    done = AMX_BLOCK * OUTPUTS, 0, 0, 0  # a block: place of its sums, tile, first row, number of rows
    is_packed = has_packed_weights(w)
    unpacked = empty_lines(tile_weights if is_packed else 0)
    num_lines = group * OUTPUTS // (2 if is_packed else 1) // LINE_BYTES
    stride, next_step = (STEP_BYTES, TILE_ROWS * STEP_BYTES) if is_tiled else (k_size, STEP_BYTES)
    configure(TILE_ROWS)
    for tile in range(tiles[0], tiles[1]):
        if is_packed:
            unpack_tile(w, tile * tile_weights // 2, tile_weights // 2, unpacked)
        for first in range(rows[0], rows[1], AMX_BLOCK):
            count = min(AMX_BLOCK, rows[1] - first)
            num_products = num_x_groups * ((count + TILE_PAIR - 1) // TILE_PAIR)
            rows_each = (done[3] + num_products - 1) // num_products
            for g in range(num_x_groups):
                offset = g * group * OUTPUTS
                for row in range(0, count, TILE_PAIR):
                    num_tiles = min(len(ROW_TILES), (count - row + TILE_ROWS - 1) // TILE_ROWS)
                    x_place = (first + row) * k_size + g * group // STEP_BYTES * next_step
                    x_rows = x_place, TILE_ROWS * k_size, stride, next_step, num_tiles
                    if is_packed:
                        multiply_group(x, *x_rows, unpacked, offset, group, totals, row * OUTPUTS)
                    else:
                        multiply_group(x, *x_rows, w, tile * tile_weights + offset, group, totals, row * OUTPUTS)
                    num_now = min(rows_each, done[3] - num_written)
                    write_scaled(sums, *done, num_written, num_now, scales, bias, out, gates, width)
                    num_written += num_now
                group_place = g * groups // num_x_groups * LANES
                unit_places = tile * OUTPUTS * groups + group_place, (tile * OUTPUTS + LANES) * groups + group_place
                x_scaled = x_scales, x_sums, first * num_x_groups + g, num_x_groups
                w_scaled = scales, zeros, unit_places
                ahead = ((tile + 1) * num_x_groups + g) * num_lines * LINE_BYTES, num_lines if first == rows[0] else 0
                scale_totals(totals, count, *x_scaled, *w_scaled, g == 0, sums, place, w, *ahead)
            done, num_written = (place, tile, first, count), 0
            place = AMX_BLOCK * OUTPUTS - place
    write_scaled(sums, *done, 0, done[3], scales, bias, out, gates, width)
    release()


@njit(**FAST)
def _multiply_rows(  # type: ignore[no-untyped-def]
    x, x_scales, sums, rows, group, w, scales, zeros, groups, bias, out, tile, gates, width, k_size
):
    """`multiply_rows` without AMX, for one tile of outputs."""
    row, last = rows
    num_whole, num_left = (last - row) // ROWS, (last - row) % ROWS
    has_half = ROWS > 4 and num_left >= ROWS // 2  # half of four are two
    part, parts = fetched_part(0, num_whole + has_half)
    while row + ROWS <= last and part < parts:
        multiply_first_rows(
            x, x_scales, sums, row, group, w, scales, zeros, groups, bias, out, tile, gates, width, k_size, part, parts
        )
        row += ROWS
        part += 1
    while row + ROWS <= last:
        multiply_many_rows(
            x, x_scales, sums, row, group, w, scales, zeros, groups, bias, out, tile, gates, width, k_size, part, parts
        )
        row += ROWS
    part = min(part, parts - 1)
    if has_half:
        multiply_half_rows(
            x, x_scales, sums, row, group, w, scales, zeros, groups, bias, out, tile, gates, width, k_size, part, parts
        )
        row += ROWS // 2
    while row + 2 <= last:
        multiply_two_rows(
            x, x_scales, sums, row, group, w, scales, zeros, groups, bias, out, tile, gates, width, k_size, part, parts
        )
        row += 2
    if row < last:
        multiply_one_row(
            x, x_scales, sums, row, group, w, scales, zeros, groups, bias, out, tile, gates, width, k_size, part, parts
        )


@njit(**FAST)
def multiply_rows(  # type: ignore[no-untyped-def]
    x, x_scales, sums, rows, group, w, scales, zeros, groups, bias, out, tiles, gates, width, k_size, min_rows, is_tiled
):
    """Rows of x int8, whose scales are float32 and sums int32, times tiles of outputs of so many `groups` of weights.

    `rows` and `tiles` are the first and the one after the last; `gates` and `width` those of `gates_ops.write_tile`.
    From `min_rows` rows on AMX multiplies. Where x `is_tiled` (`round_rows`) only AMX can: `min_rows` must be 1, and
    the first row must be that of a row tile.
    """
    if COMPILES_AMX:  # a constant alone: elsewhere Numba compiles nothing of it
        if rows[1] - rows[0] >= min_rows:
            _multiply_row_tiles(
                x,
                x_scales,
                sums,
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
            )
            return
    for tile in range(tiles[0], tiles[1]):
        _multiply_rows(x, x_scales, sums, rows, group, w, scales, zeros, groups, bias, out, tile, gates, width, k_size)


@njit(inline="always")
def round_rows(x, num_rows, k_size, group, is_tiled):  # type: ignore[no-untyped-def]
    """Round rows, within a parallel function: int8 [rows, k_size]; scales float32 and sums int32 [rows, groups].

    If `is_tiled`, integers are [row tiles, k_size / 64, 16, 64], as tiles of AMX take them. Behind many rows' integers
    lie 16 rows that such a tile may read, whose products nobody takes.
    """
    num_x_groups = k_size // group
    num_groups = num_rows * num_x_groups
    num_behind = TILE_ROWS if is_tiled or num_rows >= MIN_AMX_ROWS else 0
    x8 = empty_lines((num_rows + num_behind) * k_size).view(np.int8)
    x_scales = np.empty(num_groups, np.float32)
    x_sums = np.empty(num_groups, np.int32)
    if num_rows < ROWS and not is_tiled:  # a parallel region takes longer to start
        for g in range(num_groups):
            round_group(x, g * group, group, x8, g * group, LINE_BYTES, x_scales, x_sums, g)
    else:
        for g in prange(num_groups):
            place, next_line = g * group, LINE_BYTES
            if is_tiled:
                row, column = g // num_x_groups, g % num_x_groups * group
                place = row // TILE_ROWS * TILE_ROWS * k_size + column * TILE_ROWS + row % TILE_ROWS * STEP_BYTES
                next_line = TILE_ROWS * STEP_BYTES
            round_group(x, g * group, group, x8, place, next_line, x_scales, x_sums, g)
    return x8, x_scales, x_sums


@njit(parallel=True, **FAST)
def _product(  # type: ignore[no-untyped-def]
    x, group, w, scales, zeros, groups, bias, out, n_size, gates, width, k_size, num_threads, min_amx_rows
):
    num_rows = len(x) // k_size
    is_tiled = num_rows >= min_amx_rows
    x8, x_scales, sums = round_rows(x, num_rows, k_size, group, is_tiled)
    weights = w, scales, zeros, groups, bias
    unit_rows, row_block, min_rows = ROWS, ROW_BLOCK, NO_ROWS
    if is_tiled:
        unit_rows, min_rows = AMX_BLOCK, 1
        row_block = min(max(AMX_ROW_BYTES // k_size // unit_rows, 1) * unit_rows, ROW_BLOCK)
    claims, tiles_each = new_claims(num_threads), tiles_of_piece(OUTPUTS * k_size, num_rows, row_block)
    for thread in prange(num_threads):
        turn = 0
        while turn >= 0:
            turn, first_tile, last_tile, first_row, last_row = next_piece(
                claims, thread, turn, num_threads, n_size // OUTPUTS, num_rows, unit_rows, row_block, tiles_each
            )
            size = even_block(last_row - first_row, row_block, unit_rows)
            for row in range(first_row, last_row, size):
                end = min(last_row, row + size)
                rows, tiles = (x8, x_scales, sums, (row, end), group), (first_tile, last_tile)
                multiply_rows(*rows, *weights, out, tiles, gates, width, k_size, min_rows, is_tiled)


def interleave(q: torch.Tensor, isa: Instructions, bits: int) -> torch.Tensor:
    """Bytes q [n, k] -> flat, in the order the kernel reads: four inputs of `units` times `lanes` outputs at a time.

    4 bits: eight inputs at a time, the first four in the lower halves.
    """
    tiles: torch.Tensor = q.reshape(-1, isa.units, isa.lanes, q.shape[1] // INPUTS, INPUTS)
    tiles = tiles.permute(0, 3, 1, 2, 4)  # tile, step, unit, lane, input
    if bits == 8:
        return tiles.flatten()
    pairs: torch.Tensor = tiles.unflatten(1, (-1, 2))
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten()


class IntegerCpu:
    """`x @ weight.T + bias` for the layouts "int8" and "int4", x [rows, k] float32 rounded first."""

    rounding = None if FOUND is None else FOUND.feature
    row_counts = ()

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        reasons = []
        if FOUND is None:
            reasons.append("the processor has none of " + ", ".join(isa.feature for isa in INSTRUCTIONS))
        assert packed.scales is not None and packed.zero_points is not None
        if packed.zero_points.is_floating_point():
            reasons.append("weights have offsets in place of zero points")
        if activation_group(packed.num_inputs // packed.scales.shape[1]) is None:
            reasons.append(f"groups of weights must be a multiple of {GROUPS[-1]} inputs")
        return reasons

    def __init__(self, packed: PackedWeight) -> None:
        assert packed.scales is not None and packed.zero_points is not None
        n_size, num_groups = packed.scales.shape
        k_size = packed.num_inputs
        group = activation_group(k_size // num_groups)
        assert group is not None
        self._n_size, self._padded_size = n_size, -(-n_size // OUTPUTS) * OUTPUTS
        self._input_order = packed.input_order
        self.num_gates = count_gates(packed, OUTPUTS)
        order = gate_order(n_size, self.num_gates, ISA.lanes)
        num_bytes = self._padded_size * packed.weight.shape[1]
        weight = torch.from_numpy(new_weight(num_bytes)).view(packed.weight.dtype).view(self._padded_size, -1)
        for first in range(0, n_size, ROWS_AT_A_TIME):
            rows = slice(first, first + ROWS_AT_A_TIME)
            chosen = order[rows] if self.num_gates else rows  # which copies nothing
            weight[rows] = self._reordered(packed.weight[chosen]).view_as(weight[rows])
        zeros = packed.zero_points
        if packed.layout == "int8":
            zeros = zeros + SHIFT
        scales = flat_view(self._in_units(packed.scales[order]))
        if num_groups > 1:
            scales = scales.reshape(-1, ISA.lanes)  # tells the kernel that they are not for whole outputs
        bias = torch.zeros(n_size) if packed.bias is None else packed.bias.to(torch.float32)
        shifts = flat_view(self._in_units(zeros[order]))
        self._before = group, flat_view(weight), scales, shifts, num_groups, flat_view(padded(bias, self._padded_size))
        self._k_size, self._num_threads = k_size, get_num_threads()
        self.min_amx_rows = MIN_AMX_ROWS if HAS_AMX and group in GROUP_SIZES else NO_ROWS

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The kernel's arguments between x and out: group, weight, scales, zero points, groups of weights, bias."""
        return self._before

    def _reordered(self, weight: torch.Tensor) -> torch.Tensor:
        """Put some rows of a packed weight, filled up to whole tiles, in the order of the kernel."""
        num_outputs = -(-len(weight) // OUTPUTS) * OUTPUTS
        if weight.dtype == torch.int8:
            return interleave(padded(weight, num_outputs) ^ -SHIFT, ISA, 8)
        return interleave(padded(unpack_nibbles(weight), num_outputs), ISA, 4)

    def _in_units(self, numbers: torch.Tensor) -> torch.Tensor:
        """[n, groups] -> [units, groups, lanes]"""
        units = padded(numbers, self._padded_size).reshape(-1, ISA.lanes, numbers.shape[1])
        return units.transpose(1, 2).contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return without_padding(self._multiply(x, self._padded_size), self._n_size)

    def gated(self, x: torch.Tensor, reader: MatrixKernel | None = None) -> torch.Tensor:
        return self._multiply(x, self.num_gates)

    def _multiply(self, x: torch.Tensor, width: int) -> torch.Tensor:
        if self._input_order is not None:
            x = x[:, self._input_order]
        out, flat_out = new_output(x.shape[0], width)
        sizes = self._padded_size, self.num_gates, width, self._k_size, self._num_threads, self.min_amx_rows
        call(_product, flat_view(x), *self._before, flat_out, *sizes)
        return out
