"""The inner products of `integer_cpu` by AMX: one or two tiles of rows times a tile of outputs, group by group.

Sums of a group's products are integers, so they are those of the other instructions, whatever adds them. They go to
memory, and are scaled and added to the sums of the groups before. All functions here work inside `numba.njit` only, on
flat C-contiguous arrays and element offsets; nothing is bounds-checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from quant.kernels.bfloat16_ops import for_each_count
from quant.kernels.finished_rows_ops import fetch_row
from quant.kernels.gates_ops import output_columns, write_tile
from quant.kernels.integer_ops import INSTRUCTIONS, Builder
from quant.kernels.simd import F32, I32, array_data, prefetch_at

GROUP_SIZES = (STEP_BYTES, 2 * STEP_BYTES)
_BYTES = ir.VectorType(ir.IntType(8), LINE_BYTES)
_ISA = INSTRUCTIONS[0]
PLACES = types.UniTuple(types.intp, UNITS)
"""How a kernel passes a place for each unit: a tuple."""


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


@intrinsic
def multiply_group(  # type: ignore[no-untyped-def]
    typing_context, x, starts, steps, stride, count, w, first_weight, size, totals, place
):
    """`count` row tiles, one or two, times a group's weights: `size` inputs, 64 or 128.

    x int8; each tile's first row has its inputs at one of `starts`, the second 64 of them one of `steps` on, and the
    next row's are `stride` on. Weights are bytes without sign, from `first_weight` on: four inputs of a unit's outputs,
    those of the other unit, then the next four inputs. Totals int32 get [rows, OUTPUTS] from `place` on.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:  # LLVM would end the process
            return context.get_dummy_value()
        x, w, totals = (array_data(context, b, signature, args, i) for i in (0, 5, 8))
        starts, steps = (cgutils.unpack_tuple(b, args[i]) for i in (1, 2))
        stride, count, first_weight, size, place = (args[i] for i in (3, 4, 6, 7, 9))

        def number(value: int) -> ir.Constant:
            return ir.Constant(stride.type, value)

        def make(num_tiles: int, num_steps: int) -> None:
            sums = SUMS[: UNITS * num_tiles]
            for tile in sums:
                clear_tile(b, tile)
            for step in range(num_steps):
                weights = b.gep(w, [b.add(first_weight, number(step * STEP_BYTES * OUTPUTS))])
                for r in range(num_tiles):
                    start = b.add(starts[r], b.mul(steps[r], number(step)))
                    load_tile(b, ROWS[r], b.gep(x, [start]), stride)
                    for unit, tile in enumerate(WEIGHTS):
                        if r == 0:
                            load_weights(b, tile, unit, weights)
                        add_products(b, SIGNED_BY_UNSIGNED, SUMS[UNITS * r + unit], ROWS[r], tile)
            for index, tile in enumerate(sums):
                offset = number(index // UNITS * TILE_ROWS * OUTPUTS + index % UNITS * LANES)
                store_tile(b, tile, b.gep(totals, [b.add(place, offset)]), number(OUTPUTS * 4))

        with b.if_else(b.icmp_signed(">", size, number(STEP_BYTES))) as (two_steps, one_step):
            with two_steps:
                for_each_count(b, count, lambda num_tiles: make(num_tiles, 2), len(ROWS))
            with one_step:
                for_each_count(b, count, lambda num_tiles: make(num_tiles, 1), len(ROWS))
        return context.get_dummy_value()

    i, pair = types.intp, types.UniTuple(types.intp, len(ROWS))
    return types.none(x, pair, pair, i, i, w, i, i, totals, i), codegen


@intrinsic
def scale_totals(  # type: ignore[no-untyped-def]
    typing_context,
    totals,
    count,
    x_scales,
    x_sums,
    place,
    stride,
    scales,
    zeros,
    unit_places,
    is_first,
    sums,
    to,
    w,
    ahead,
    num_lines,
):
    """Take zero points off totals int32 [count, OUTPUTS] and add them, scaled, to sums float32 like them from `to` on.

    The first row's scale and sum are at `place`, the next one's `stride` on. `unit_places` are where the scales and
    zero points of each unit's outputs begin. If this group is the first, sums begin with 0. Up to the scaling all is
    whole numbers below 2^24, so that float32 has them exactly. A flat array of scales is for whole outputs:
    `write_scaled` applies it.

    Meanwhile it asks for `num_lines` lines of weights w, those from byte `ahead` on: some beside each row, as a core
    waits if it asks for many at once.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        v = Builder(b, _ISA)
        totals, x_scales, x_sums, scales, zeros, sums = (
            array_data(context, b, signature, args, i) for i in (0, 2, 3, 6, 7, 10)
        )
        count, place, stride, is_first, to, ahead, num_lines = (args[i] for i in (1, 4, 5, 9, 11, 13, 14))
        w = b.bitcast(array_data(context, b, signature, args, 12), ir.IntType(8).as_pointer())
        offsets = cgutils.unpack_tuple(b, args[8])
        scale_array, zero_type = signature.args[6], signature.args[7].dtype
        negative = [b.sitofp(b.neg(v.numbers(zeros, offset, zero_type)), v.f32) for offset in offsets]
        factors = [v.numbers(scales, offset, scale_array.dtype) for offset in offsets] if scale_array.ndim > 1 else []

        def number(value: int) -> ir.Constant:
            return ir.Constant(count.type, value)

        def add_rows(before: Callable[[Any], Any], lines_each: Any) -> None:
            with cgutils.for_range(b, count) as loop:
                row = b.add(place, b.mul(loop.index, stride))
                x_scale = v.splat(v.load(x_scales, row, F32))
                x_sum = v.splat(b.sitofp(v.load(x_sums, row, I32), F32))
                if lines_each is not None:
                    line = b.mul(loop.index, lines_each)
                    left = b.sub(num_lines, line)
                    num_now = b.select(b.icmp_signed("<", left, lines_each), left, lines_each)
                    with cgutils.for_range(b, num_now) as lines:
                        offset = b.mul(b.add(line, lines.index), number(LINE_BYTES))
                        prefetch_at(b, w, b.add(ahead, offset))
                for unit in range(UNITS):
                    offset = b.add(b.mul(loop.index, number(OUTPUTS)), number(unit * LANES))
                    target = b.add(to, offset)
                    total = v.fma(negative[unit], x_sum, b.sitofp(v.load(totals, offset, v.i32), v.f32))
                    if factors:
                        total = v.fma(b.fmul(total, x_scale), factors[unit], before(target))
                    else:
                        total = v.fma(total, x_scale, before(target))
                    v.store(total, sums, target)

        def add(before: Callable[[Any], Any]) -> None:
            with b.if_else(b.icmp_signed("==", num_lines, number(0))) as (none, some):
                with none:
                    add_rows(before, None)
                with some:
                    add_rows(before, b.sdiv(b.sub(b.add(num_lines, count), number(1)), count))

        with b.if_else(b.icmp_signed("!=", is_first, ir.Constant(is_first.type, 0))) as (first, later):
            with first:
                add(lambda offset: v.constant(v.f32, 0.0))
            with later:
                add(lambda offset: v.load(sums, offset, v.f32))
        return context.get_dummy_value()

    i = types.intp
    return types.none(totals, i, x_scales, x_sums, i, i, scales, zeros, PLACES, i, sums, i, w, i, i), codegen


@intrinsic
def write_scaled(  # type: ignore[no-untyped-def]
    typing_context, sums, place, tile, first, count, begin, num_rows, scales, bias, out, gates, width, stride, shift
):
    """Write `num_rows` rows of a block, from its row `begin` on, as rows of out.

    The block's `count` rows are from row `first` of out on; its sums with a tile of outputs, float32 [count, OUTPUTS],
    begin at `place`. Scales are as in `scale_totals`, `gates` and `width` those of `gates_ops.write_tile`. A row of out
    begins `stride` after the one before, and the first one at `shift`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        v = Builder(b, _ISA)
        sums, scales, bias, out = (array_data(context, b, signature, args, i) for i in (0, 7, 8, 9))
        place, tile, first, count, begin, num_rows, gates, width, stride, shift = (
            args[i] for i in (1, 2, 3, 4, 5, 6, 10, 11, 12, 13)
        )
        out = b.gep(out, [shift])

        def number(value: int) -> ir.Constant:
            return ir.Constant(count.type, value)

        scale_array, columns = signature.args[7], output_columns(b, tile, gates, UNITS, LANES)
        added, factors = [v.load(bias, column, v.f32) for column in columns], []
        if scale_array.ndim == 1:
            offsets = [b.add(b.mul(tile, number(OUTPUTS)), number(unit * LANES)) for unit in range(UNITS)]
            factors = [v.numbers(scales, offset, scale_array.dtype) for offset in offsets]
        with cgutils.for_range(b, num_rows) as loop:
            index = b.add(begin, loop.index)
            fetch_row(b, out, first, index, count, columns, gates, width, stride)
            start = b.add(place, b.mul(index, number(OUTPUTS)))
            values = [v.load(sums, b.add(start, number(unit * LANES)), v.f32) for unit in range(UNITS)]
            if factors:
                results = [v.fma(*each) for each in zip(values, factors, added, strict=True)]
            else:
                results = [b.fadd(value, more) for value, more in zip(values, added, strict=True)]
            write_tile(b, out, b.add(first, index), [results], columns, gates, width, stride)
        return context.get_dummy_value()

    i = types.intp
    return types.none(sums, i, i, i, i, i, i, scales, bias, out, i, i, i, i), codegen
