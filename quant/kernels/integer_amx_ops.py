"""The inner products of `integer_cpu` by AMX: one or two tiles of rows times a tile of outputs, group by group.

Sums of a group's products are integers, so they are those of the other instructions, whatever adds them. They go to
memory, and are scaled and added to the sums of the groups before. That takes as long as the products, but other units
of the processor: so rows are scaled, and others whose sums are done are written, between the products that follow.

All functions here work inside `numba.njit` only, on flat C-contiguous arrays and element offsets; nothing is
bounds-checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.amx import (
    COMPILES_AMX,
    LANES,
    OUTPUTS,
    ROWS,
    SIGNED_BY_UNSIGNED,
    STEP_BYTES,
    SUMS,
    TILE_ROWS,
    UNITS,
    WEIGHTS,
    add_products,
    clear_tile,
    load_tile,
    load_weights,
    store_tile,
)
from quant.kernels.arrays import LINE_BYTES
from quant.kernels.bfloat16_ops import for_each_count, loop_as_written
from quant.kernels.finished_rows_ops import fetch_row
from quant.kernels.gates_ops import output_columns, write_tile
from quant.kernels.integer_ops import INSTRUCTIONS, Builder
from quant.kernels.simd import F32, I32, array_data, prefetch_at

GROUP_SIZES = (STEP_BYTES, 2 * STEP_BYTES)
_BYTES = ir.VectorType(ir.IntType(8), LINE_BYTES)
_ISA = INSTRUCTIONS[0]
_WRITES = 2
"""Times that rows are written during a group's products: code for it, with that of gates, is long."""


class TotalRows(NamedTuple):
    """Rows whose totals of a group, int32 [count, OUTPUTS], are to be scaled and added to sums float32 like them."""

    place: Any
    """Where their totals begin."""
    count: Any
    """How many there are; 0: none."""
    x_place: Any
    """Where the scale and the sum of the first row's inputs are."""
    next_x: Any
    """How far on those of the next row are."""
    first_unit: Any
    """Where the scales and zero points of the first unit's outputs begin."""
    second_unit: Any
    before: Any
    """Where the sums of the groups before begin, or zeros."""
    next_before: Any
    """How far on those of the next row are."""
    to: Any
    """Where the sums begin."""


class SummedRows(NamedTuple):
    """Rows whose sums with a tile of outputs are done, to be written: `num_rows` of a block's from `begin` on."""

    place: Any
    """Where the block's sums begin, float32 [count, OUTPUTS]."""
    tile: Any
    """The tile of outputs."""
    first: Any
    """The row of out that is the block's first."""
    count: Any
    """The block's rows."""
    begin: Any
    num_rows: Any
    gates: Any
    """This and `width` are those of `gates_ops.write_tile`."""
    width: Any
    next_row: Any
    """How far on the next row of out begins."""
    shift: Any
    """Where row 0 of out would begin."""


class Lines(NamedTuple):
    """Lines of weights that are asked for: some beside each product, as a core waits if it asks for many at once."""

    first: Any
    """The first byte."""
    count: Any
    """How many there are."""


TOTAL_ROWS, SUMMED_ROWS, LINES = (
    types.UniTuple(types.intp, len(kind._fields)) for kind in (TotalRows, SummedRows, Lines)
)
"""How a kernel passes them: tuples."""


@intrinsic
def has_packed_weights(typing_context, w):  # type: ignore[no-untyped-def]
    """Whether such an array has weights of 4 bits: those of 8 are int8."""
    is_packed = w.dtype == types.uint8
    return types.boolean(w), lambda context, b, signature, args: context.get_constant(types.boolean, is_packed)


@intrinsic
def unpack_tile(typing_context, w, first, num_bytes, unpacked):  # type: ignore[no-untyped-def]
    """Write weights of 4 bits, `num_bytes` from `first` on, as bytes: in the order of weights of 8 bits."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, unpacked = (array_data(context, b, signature, args, i) for i in (0, 3))
        first, num_bytes = args[1], args[2]

        def number(value: int) -> ir.Constant:
            return ir.Constant(first.type, value)

        step_bytes = UNITS * LINE_BYTES
        with cgutils.for_range(b, b.sdiv(num_bytes, number(step_bytes))) as loop:
            source = b.add(first, b.mul(loop.index, number(step_bytes)))
            place = b.mul(loop.index, number(2 * step_bytes))
            for unit in range(UNITS):
                at = b.gep(w, [b.add(source, number(unit * LINE_BYTES))])
                pairs = b.load(b.bitcast(at, _BYTES.as_pointer()))
                pairs.align = 1
                mask, four = (ir.Constant(_BYTES, [value] * LINE_BYTES) for value in (15, 4))
                for half, value in enumerate((b.and_(pairs, mask), b.and_(b.lshr(pairs, four), mask))):
                    to = b.gep(unpacked, [b.add(place, number((half * UNITS + unit) * LINE_BYTES))])
                    b.store(value, b.bitcast(to, _BYTES.as_pointer())).align = 1
        return context.get_dummy_value()

    at = types.intp
    return types.none(w, at, at, unpacked), codegen


def _share(b: Any, count: Any, part: int, parts: int) -> Any:
    """The first of `count` things that are not among those of the parts before this one."""
    return b.sdiv(b.mul(count, ir.Constant(count.type, part)), ir.Constant(count.type, parts))


class _Scaler:
    """The code that scales totals. Up to the scaling all is whole numbers below 2^24: float32 has them exactly.

    A flat array of scales is for whole outputs: `_Writer` applies it.
    """

    def __init__(self, v: Builder, arrays: Sequence[Any], scale_array: Any, zero_type: Any, rows: TotalRows) -> None:
        """`arrays` are totals, scales and sums of x, scales and zero points of weights, and sums."""
        self._v, self._rows = v, rows
        self._totals, self._x_scales, self._x_sums, scales, zeros, self._sums = arrays
        places = rows.first_unit, rows.second_unit
        self._negative = [v.b.sitofp(v.b.neg(v.numbers(zeros, place, zero_type)), v.f32) for place in places]
        has_groups = scale_array.ndim > 1
        self._factors = [v.numbers(scales, place, scale_array.dtype) for place in places] if has_groups else []

    def scale(self, part: int, parts: int) -> None:
        """Scale one of so many parts of the rows."""
        v, b, rows = self._v, self._v.b, self._rows
        begin, end = _share(b, rows.count, part, parts), _share(b, rows.count, part + 1, parts)
        with loop_as_written(b, b.sub(end, begin)) as loop:
            index = b.add(begin, loop.index)
            x_place = b.add(rows.x_place, b.mul(index, rows.next_x))
            x_scale = v.splat(v.load(self._x_scales, x_place, F32))
            x_sum = v.splat(b.sitofp(v.load(self._x_sums, x_place, I32), F32))
            for unit in range(UNITS):
                lane = ir.Constant(index.type, unit * LANES)
                offset = b.add(b.mul(index, ir.Constant(index.type, OUTPUTS)), lane)
                source = b.add(b.add(rows.before, b.mul(index, rows.next_before)), lane)
                total = b.sitofp(v.load(self._totals, b.add(rows.place, offset), v.i32), v.f32)
                total, before = v.fma(self._negative[unit], x_sum, total), v.load(self._sums, source, v.f32)
                if self._factors:
                    total = v.fma(b.fmul(total, x_scale), self._factors[unit], before)
                else:
                    total = v.fma(total, x_scale, before)
                v.store(total, self._sums, b.add(rows.to, offset))


class _Writer:
    """The code that writes rows of sums."""

    def __init__(self, v: Builder, arrays: Sequence[Any], scale_array: Any, rows: SummedRows) -> None:
        """`arrays` are sums, scales of weights, biases and out."""
        b = v.b
        self._v, self._rows = v, rows
        self._sums, scales, bias, out = arrays
        self._out = b.gep(out, [rows.shift])
        self._columns = output_columns(b, rows.tile, rows.gates, UNITS, LANES)
        self._added, self._factors = [v.load(bias, column, v.f32) for column in self._columns], []
        if scale_array.ndim == 1:
            first = b.mul(rows.tile, ir.Constant(rows.tile.type, OUTPUTS))
            offsets = [b.add(first, ir.Constant(first.type, unit * LANES)) for unit in range(UNITS)]
            self._factors = [v.numbers(scales, offset, scale_array.dtype) for offset in offsets]

    def write(self, part: int, parts: int) -> None:
        """Write one of so many parts of the rows, and ask for the lines of those that follow."""
        v, b, rows = self._v, self._v.b, self._rows
        begin, end = _share(b, rows.num_rows, part, parts), _share(b, rows.num_rows, part + 1, parts)
        with loop_as_written(b, b.sub(end, begin)) as loop:
            index = b.add(b.add(rows.begin, begin), loop.index)
            places = self._columns, rows.gates, rows.width, rows.next_row
            fetch_row(b, self._out, rows.first, index, rows.count, *places)
            start = b.add(rows.place, b.mul(index, ir.Constant(index.type, OUTPUTS)))
            lanes = [ir.Constant(index.type, unit * LANES) for unit in range(UNITS)]
            values = [v.load(self._sums, b.add(start, lane), v.f32) for lane in lanes]
            if self._factors:
                results = [v.fma(*each) for each in zip(values, self._factors, self._added, strict=True)]
            else:
                results = [b.fadd(value, more) for value, more in zip(values, self._added, strict=True)]
            write_tile(b, self._out, b.add(rows.first, index), [results], *places)


@intrinsic
def multiply_group(  # type: ignore[no-untyped-def]
    typing_context,
    x,
    starts,
    steps,
    stride,
    count,
    w,
    first_weight,
    size,
    totals,
    place,
    total_rows,
    x_scales,
    x_sums,
    scales,
    zeros,
    sums,
    summed_rows,
    bias,
    out,
    stored,
    lines,
):
    """`count` row tiles, one or two, times a group's weights: `size` inputs, 64 or 128.

    x int8; each tile's first row has its inputs at one of `starts`, the second 64 of them one of `steps` on, and the
    next row's are `stride` on. Weights are bytes without sign, from `first_weight` on: four inputs of a unit's outputs,
    those of the other unit, then the next four inputs. Totals int32 get [rows, OUTPUTS] from `place` on.

    Between the products `TotalRows`, `SummedRows` and `Lines` of the weights as they are `stored` are done: each
    half of the rows is scaled before the same half is written.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:  # LLVM would end the process
            return context.get_dummy_value()
        array = {name: array_data(context, b, signature, args, names.index(name)) for name in arrays}
        by_name = dict(zip(names, args, strict=True))
        starts, steps = (cgutils.unpack_tuple(b, by_name[name]) for name in ("starts", "steps"))
        stride, first_weight, place = (by_name[name] for name in ("stride", "first_weight", "place"))
        kind = dict(zip(names, signature.args, strict=True))
        v = Builder(b, _ISA)
        rows = TotalRows(*cgutils.unpack_tuple(b, by_name["total_rows"]))
        done = SummedRows(*cgutils.unpack_tuple(b, by_name["summed_rows"]))
        lines = Lines(*cgutils.unpack_tuple(b, by_name["lines"]))
        inputs = [array[name] for name in ("totals", "x_scales", "x_sums", "scales", "zeros", "sums")]
        scaler = _Scaler(v, inputs, kind["scales"], kind["zeros"].dtype, rows)
        writer = _Writer(v, [array[name] for name in ("sums", "scales", "bias", "out")], kind["scales"], done)
        stored = b.bitcast(array["stored"], ir.IntType(8).as_pointer())

        def number(value: int) -> ir.Constant:
            return ir.Constant(stride.type, value)

        def work(part: int, parts: int) -> None:
            scaler.scale(part, parts)
            begin, end = _share(b, lines.count, part, parts), _share(b, lines.count, part + 1, parts)
            with loop_as_written(b, b.sub(end, begin)) as loop:
                line = b.mul(b.add(begin, loop.index), number(LINE_BYTES))
                prefetch_at(b, stored, b.add(lines.first, line))
            half = parts // _WRITES
            if (part + 1) % half == 0:
                writer.write(part // half, _WRITES)

        def make(num_tiles: int, num_steps: int) -> None:
            sums = SUMS[: UNITS * num_tiles]
            parts, part = len(sums) * num_steps, 0
            for tile in sums:
                clear_tile(b, tile)
            for step in range(num_steps):
                weights = b.gep(array["w"], [b.add(first_weight, number(step * STEP_BYTES * OUTPUTS))])
                for r in range(num_tiles):
                    start = b.add(starts[r], b.mul(steps[r], number(step)))
                    load_tile(b, ROWS[r], b.gep(array["x"], [start]), stride)
                    for unit, tile in enumerate(WEIGHTS):
                        if r == 0:
                            load_weights(b, tile, unit, weights)
                        add_products(b, SIGNED_BY_UNSIGNED, SUMS[UNITS * r + unit], ROWS[r], tile)
                        work(part, parts)
                        part += 1
            for index, tile in enumerate(sums):
                offset = number(index // UNITS * TILE_ROWS * OUTPUTS + index % UNITS * LANES)
                store_tile(b, tile, b.gep(array["totals"], [b.add(place, offset)]), number(OUTPUTS * 4))

        with b.if_else(b.icmp_signed(">", by_name["size"], number(STEP_BYTES))) as (two_steps, one_step):
            with two_steps:
                for_each_count(b, by_name["count"], lambda num_tiles: make(num_tiles, 2), len(ROWS))
            with one_step:
                for_each_count(b, by_name["count"], lambda num_tiles: make(num_tiles, 1), len(ROWS))
        return context.get_dummy_value()

    i, pair = types.intp, types.UniTuple(types.intp, len(ROWS))
    names = (
        "x starts steps stride count w first_weight size totals place total_rows x_scales x_sums scales zeros sums "
        "summed_rows bias out stored lines"
    ).split()
    arrays = "x w totals x_scales x_sums scales zeros sums bias out stored".split()
    products = x, pair, pair, i, i, w, i, i, totals, i
    scaling, writing = (TOTAL_ROWS, x_scales, x_sums, scales, zeros, sums), (SUMMED_ROWS, bias, out)
    return types.none(*products, *scaling, *writing, stored, LINES), codegen


@intrinsic
def scale_totals(typing_context, totals, total_rows, x_scales, x_sums, scales, zeros, sums):  # type: ignore[no-untyped-def]
    """Scale `TotalRows`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        arrays = [array_data(context, b, signature, args, i) for i in (0, 2, 3, 4, 5, 6)]
        rows, kinds = TotalRows(*cgutils.unpack_tuple(b, args[1])), signature.args
        _Scaler(Builder(b, _ISA), arrays, kinds[4], kinds[5].dtype, rows).scale(0, 1)
        return context.get_dummy_value()

    return types.none(totals, TOTAL_ROWS, x_scales, x_sums, scales, zeros, sums), codegen


@intrinsic
def write_sums(typing_context, sums, summed_rows, scales, bias, out):  # type: ignore[no-untyped-def]
    """Write `SummedRows`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        arrays = [array_data(context, b, signature, args, i) for i in (0, 2, 3, 4)]
        rows = SummedRows(*cgutils.unpack_tuple(b, args[1]))
        _Writer(Builder(b, _ISA), arrays, signature.args[2], rows).write(0, 1)
        return context.get_dummy_value()

    return types.none(sums, SUMMED_ROWS, scales, bias, out), codegen
