"""The writing of rows whose sums with a tile of outputs are done: what AMX does beside its products.

Gates take as long as a third of a product, and lines of the output come from far away. So a row is written while the
next rows are multiplied, and its lines are asked for some rows before. All functions here work inside `numba.njit`
only, on flat C-contiguous arrays and element offsets; nothing is bounds-checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.amx import COMPILES_AMX, LANES, OUTPUTS, STEP_BYTES, UNITS
from quant.kernels.bfloat16_ops import WEIGHT_BYTES, rounded_lanes, vector_at
from quant.kernels.gates_ops import gated_of, output_columns, write_tile
from quant.kernels.simd import F32, array_data, prefetch_at

STEP_INPUTS = STEP_BYTES // WEIGHT_BYTES
"""Inputs that an instruction takes."""
FETCHED_ROWS = 8
"""Rows before it is written that a row's lines are asked for: what a step writes does not wait for the memory then."""
_FLOATS = ir.VectorType(F32, LANES)


class FinishedRows(NamedTuple):
    """Rows whose sums with a tile of outputs are done, and where they go: one row tile, or two neighbours."""

    place: Any
    """Where their sums begin."""
    row: Any
    """The first of them."""
    count: Any
    """How many there are; 0: none."""
    tile_rows: Any
    """Rows of the first row tile, if there is a second."""
    tile: Any
    """The tile of outputs."""
    gates: Any
    """This and `width` are those of `gates_ops.write_tile`."""
    width: Any
    is_rounded: Any
    """Not 0: out gets silu(gate) * value as the next product takes it, bfloat16 [row tiles, width / 32, rows, 32]."""


FINISHED = types.UniTuple(types.intp, len(FinishedRows._fields))


def fetch_row(
    b: Any, out: Any, first: Any, index: Any, count: Any, columns: Sequence[Any], gates: Any, width: Any, stride: Any
) -> None:
    """Ask for the lines of out in which `gates_ops.write_tile` will write a later row, while row `index` is written.

    There are `count` rows from `first` on.
    """
    following = _following(b, index, count)
    next_row = b.mul(b.add(first, following), stride)
    begin, end = columns[0], columns[-1]  # of which gates write the first alone
    end = b.select(b.icmp_signed("==", gates, width), begin, end)
    for column in (begin, end):
        prefetch_at(b, out, b.add(next_row, column), is_near=True, is_written=True)


def _following(b: Any, index: Any, count: Any) -> Any:
    """The row, of `count`, whose lines are asked for while row `index` is written."""
    following = b.add(index, ir.Constant(index.type, FETCHED_ROWS))
    return b.select(b.icmp_signed("<", following, count), following, index)


class RowWriter:
    """The code that adds biases to the sums of finished rows, and writes a row."""

    def __init__(self, b: Any, sums: Any, bias: Any, out: Any, finished: FinishedRows) -> None:
        self._builder, self._sums, self._out, self._finished = b, sums, out, finished
        self._columns = output_columns(b, finished.tile, finished.gates, UNITS, LANES)
        self._biases = [vector_at(b, b.gep(bias, [column]), _FLOATS) for column in self._columns]

    def _number(self, value: int) -> ir.Constant:
        return ir.Constant(self._finished.place.type, value)

    def write(self, index: Any) -> None:
        """Write row `index` of them, and ask for the lines of one that follows."""
        b, finished, number = self._builder, self._finished, self._number
        at = b.add(finished.place, b.mul(index, number(OUTPUTS)))
        lines = [vector_at(b, b.gep(self._sums, [b.add(at, number(u * LANES))]), _FLOATS) for u in range(UNITS)]
        results = [b.fadd(line, more) for line, more in zip(lines, self._biases, strict=True)]
        with b.if_else(b.icmp_signed("!=", finished.is_rounded, number(0))) as (rounded, whole):
            with whole:
                places = self._columns, finished.gates, finished.width, finished.width
                fetch_row(b, self._out, finished.row, index, finished.count, *places)
                write_tile(b, self._out, b.add(finished.row, index), [results], *places)
            with rounded:
                following = self._rounded_place(_following(b, index, finished.count))
                prefetch_at(b, following, number(0), is_near=True, is_written=True)
                halves, place = rounded_lanes(b, gated_of(b, *results)), self._rounded_place(index)
                b.store(halves, b.bitcast(place, halves.type.as_pointer())).align = 2

    def _rounded_place(self, index: Any) -> Any:
        """Where row `index` of them gets its numbers, a pointer to 16-bit integers."""
        b, finished, number = self._builder, self._finished, self._number
        before = b.select(b.icmp_signed(">=", index, finished.tile_rows), finished.tile_rows, number(0))
        rows = b.sub(finished.count, before)
        rows = b.select(b.icmp_signed("<", rows, finished.tile_rows), rows, finished.tile_rows)
        step, lane = (operate(self._columns[0], number(STEP_INPUTS)) for operate in (b.udiv, b.urem))
        inside = b.add(b.mul(step, rows), b.sub(index, before))
        start = b.mul(b.add(finished.row, before), finished.width)
        start = b.add(b.add(start, b.mul(inside, number(STEP_INPUTS))), lane)
        return b.gep(b.bitcast(self._out, ir.IntType(16).as_pointer()), [start])


@intrinsic
def write_rows(typing_context, sums, bias, out, finished):  # type: ignore[no-untyped-def]
    """Write finished rows; `finished` is a tuple of the fields of `FinishedRows`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:  # LLVM would end the process
            return context.get_dummy_value()
        sums, bias, out = (array_data(context, b, signature, args, i) for i in range(3))
        finished = FinishedRows(*cgutils.unpack_tuple(b, args[3]))
        writer = RowWriter(b, sums, bias, out, finished)
        with cgutils.for_range(b, finished.count) as loop:
            writer.write(loop.index)
        return context.get_dummy_value()

    return types.none(sums, bias, out, FINISHED), codegen
