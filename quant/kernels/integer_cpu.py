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
from quant.kernels.amx import COMPILES_AMX, HAS_AMX, LANES
from quant.kernels.arrays import FAST, call, empty_lines, flat_view, new_output, new_weight
from quant.kernels.gates_ops import count_gates, gate_order
from quant.kernels.integer_amx_ops import GROUP_SIZES
from quant.kernels.integer_amx_rows import AMX_BLOCK, multiply_row_tiles, rounds_gates
from quant.kernels.integer_ops import (
    INPUTS,
    INSTRUCTIONS,
    Instructions,
    find_instructions,
    make_tile,
)
from quant.kernels.padding_cpu import padded, without_padding
from quant.kernels.rounded_rows import MIN_AMX_ROWS, round_rows, rounded_parts
from quant.kernels.rounded_torch import GROUPS, activation_group
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
NO_ROWS = 1 << 40
"""A number of rows that no product has."""
ROWS_AT_A_TIME = 128 * OUTPUTS
"""Outputs that are put into the kernel's order together: bounds the memory for copies."""
ROWS = ISA.rows
multiply_first_rows, multiply_many_rows = make_tile(ISA, ROWS), make_tile(ISA, ROWS, is_fetching=False)
multiply_half_rows = make_tile(ISA, ROWS // 2)
multiply_two_rows, multiply_one_row = make_tile(ISA, 2), make_tile(ISA, 1)


@njit(**FAST)
def _multiply_tile(  # type: ignore[no-untyped-def]
    x, x_scales, sums, rows, group, w, scales, zeros, groups, bias, out, tile, gates, width, k_size
):
    """`multiply_rows` for one tile of outputs."""
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


@njit(inline="always")
def multiply_rows(  # type: ignore[no-untyped-def]
    x, x_scales, sums, rows, group, w, scales, zeros, groups, bias, out, tiles, gates, width, k_size
):
    """Rows of x int8, whose scales are float32 and sums int32, times tiles of outputs of so many `groups` of weights.

    `rows` and `tiles` are the first and the one after the last; `gates` and `width` those of `gates_ops.write_tile`.
    """
    for tile in range(tiles[0], tiles[1]):  # no tuples: users of their arrays would be counted each time
        _multiply_tile(x, x_scales, sums, rows, group, w, scales, zeros, groups, bias, out, tile, gates, width, k_size)


@njit(parallel=True, **FAST)
def _product(  # type: ignore[no-untyped-def]
    x, group, w, scales, zeros, groups, bias, out, n_size, gates, width, k_size, num_threads, min_amx_rows, rounded
):
    """x float32 flat [rows, k_size] times a matrix of n_size outputs -> out float32 flat [rows, width].

    `rounded` says whether x is what the product before made for this one, and how many gates of out are a group that
    the product behind rounds, or 0. Both hold only where `rounds_gates` says so: fewer rows are float32 after all.
    """
    num_rows = len(x) // k_size
    is_tiled = num_rows >= min_amx_rows
    if rounded[0] > 0 and rounds_gates(num_rows, min_amx_rows, k_size // group, num_threads):
        x8, x_scales, sums = rounded_parts(x, num_rows, k_size, group)
    else:
        x8, x_scales, sums = round_rows(x, num_rows, k_size, group, is_tiled)
    unit_rows, row_block, unit_tiles, gates_each = ROWS, ROW_BLOCK, 1, 0
    if is_tiled:
        unit_rows = AMX_BLOCK
        row_block = min(max(AMX_ROW_BYTES // k_size // unit_rows, 1) * unit_rows, ROW_BLOCK)
    if rounded[1] > 0 and rounds_gates(num_rows, min_amx_rows, gates // max(rounded[1], 1), num_threads):
        gates_each = rounded[1]
        unit_tiles = gates_each // LANES
    waiting_each = row_block * gates_each
    waiting = empty_lines(num_threads * waiting_each * 4).view(np.float32)
    out_parts = rounded_parts(out, num_rows, width, max(gates_each, 1))
    claims, tiles_each = new_claims(num_threads), tiles_of_piece(unit_tiles * OUTPUTS * k_size, num_rows, row_block)
    num_units = n_size // OUTPUTS // unit_tiles
    for thread in prange(num_threads):
        thread_waiting, turn = waiting[thread * waiting_each : (thread + 1) * waiting_each], 0
        while turn >= 0:
            turn, first_unit, last_unit, first_row, last_row = next_piece(
                claims, thread, turn, num_threads, num_units, num_rows, unit_rows, row_block, tiles_each
            )
            tiles = first_unit * unit_tiles, last_unit * unit_tiles
            size = even_block(last_row - first_row, row_block, unit_rows)
            for row in range(first_row, last_row, size):
                span = row, min(last_row, row + size)
                if not is_tiled:
                    multiply_rows(
                        x8,
                        x_scales,
                        sums,
                        span,
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
                    )
                elif COMPILES_AMX:  # a constant alone: elsewhere Numba compiles nothing of it
                    how = out, tiles, gates, width, k_size, True, (gates_each, thread_waiting, *out_parts)
                    multiply_row_tiles(x8, x_scales, sums, span, group, w, scales, zeros, groups, bias, *how)


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
        # Each type of scales is a kernel to compile. Of whole outputs there are few: float32, and for 8 bits alone.
        is_of_outputs = num_groups == 1 and packed.layout == "int8"
        scale_type = torch.float32 if is_of_outputs else packed.scales.dtype
        scales = flat_view(self._in_units(packed.scales[order].to(scale_type)))
        if not is_of_outputs:
            scales = scales.reshape(-1, ISA.lanes)  # tells the kernel that they are for groups
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
        """If such a kernel is the reader: int8 [rows, 4 * num_gates], as no other kernel would read it.

        Many rows are as `rounded_rows` puts them for tiles: integers, their scales, their sums. Fewer rows are float32
        all the same; the kernels know, and a program makes the same calls for both.
        """
        gates_each = reader._rounded_inputs(self) if isinstance(reader, IntegerCpu) else 0
        out = self._multiply(x, self.num_gates, gates_each)
        return out.view(torch.int8) if gates_each else out

    def _rounded_inputs(self, writer: IntegerCpu) -> int:
        """How many inputs are a group that the gated kernel `writer` may round; 0: it can't."""
        own_split, writer_split = ((kernel._num_threads, kernel.min_amx_rows) for kernel in (self, writer))
        fits = own_split == writer_split and self.min_amx_rows < NO_ROWS and self._k_size == writer.num_gates
        return self._before[0] if fits and self._input_order is None else 0

    def _multiply(self, x: torch.Tensor, width: int, gates_each: int = 0) -> torch.Tensor:
        is_rounded = x.dtype == torch.int8  # by `gated`: all else is float32
        if is_rounded:
            x = x.view(torch.float32)
        if self._input_order is not None:
            x = x[:, self._input_order]
        out, flat_out = new_output(x.shape[0], width)
        sizes = self._padded_size, self.num_gates, width, self._k_size, self._num_threads, self.min_amx_rows
        call(_product, flat_view(x), *self._before, flat_out, *sizes, (int(is_rounded), gates_each))
        return out
