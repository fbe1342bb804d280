"""The inner products of `integer_cpu` by AMX: four tiles of rows times a tile of outputs, group by group.

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
from quant.kernels.gates_ops import output_columns, write_tile
from quant.kernels.integer_ops import INSTRUCTIONS, Builder
from quant.kernels.simd import F32, I32, array_data

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
def multiply_group(typing_context, x, first, next_rows, stride, count, w, first_weight, size):  # type: ignore[no-untyped-def]
    """`count` row tiles, one to four, times a group's weights of one unit: `size` inputs, 64 or 128.

    Sums are those of the row tiles, so that products of neighbouring ones do not wait for each other; tiles of rows and
    of weights are those of the group's first 64 inputs, and of the others.

    x int8; the first row's inputs begin at `first`, the next one's `stride` on, those of the next tile `next_rows` on.
    Weights are bytes without sign, from `first_weight` on: four inputs of a unit's outputs, those of the other unit,
    then the next four inputs.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:  # LLVM would end the process
            return context.get_dummy_value()
        x, w = (array_data(context, b, signature, args, i) for i in (0, 5))
        first, next_rows, stride, count, first_weight, size = (args[i] for i in (1, 2, 3, 4, 6, 7))

        def number(value: int) -> ir.Constant:
            return ir.Constant(first.type, value)

        def make(num_tiles: int, num_steps: int) -> None:
            for step in range(num_steps):
                place = b.gep(w, [b.add(first_weight, number(step * STEP_BYTES * OUTPUTS))])
                load_weights(b, WEIGHTS[step], 0, place)
            for index, sums in enumerate(SUMS[:num_tiles]):
                clear_tile(b, sums)
                start = b.add(first, b.mul(next_rows, number(index)))
                for step in range(num_steps):
                    load_tile(b, ROWS[step], b.gep(x, [b.add(start, number(step * STEP_BYTES))]), stride)
                    add_products(b, SIGNED_BY_UNSIGNED, sums, ROWS[step], WEIGHTS[step])

        with b.if_else(b.icmp_signed(">", size, number(STEP_BYTES))) as (two_steps, one_step):
            with two_steps:
                for_each_count(b, count, lambda num_tiles: make(num_tiles, 2), len(SUMS))
            with one_step:
                for_each_count(b, count, lambda num_tiles: make(num_tiles, 1), len(SUMS))
        return context.get_dummy_value()

    i = types.intp
    return types.none(x, i, i, i, i, w, i, i), codegen


@intrinsic
def store_totals(typing_context, count, totals, place, next_tile):  # type: ignore[no-untyped-def]
    """Write what was multiplied to totals int32 [rows, OUTPUTS], from `place` on, the next tile's `next_tile` on."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:  # LLVM would end the process
            return context.get_dummy_value()
        totals = array_data(context, b, signature, args, 1)
        count, place, next_tile = args[0], args[2], args[3]

        def make(num_tiles: int) -> None:
            for index, tile in enumerate(SUMS[:num_tiles]):
                at = b.add(place, b.mul(next_tile, ir.Constant(place.type, index)))
                store_tile(b, tile, b.gep(totals, [at]), ir.Constant(place.type, OUTPUTS * 4))

        for_each_count(b, count, make, len(SUMS))
        return context.get_dummy_value()

    i = types.intp
    return types.none(i, totals, i, i), codegen


@intrinsic
def scale_totals(  # type: ignore[no-untyped-def]
    typing_context, totals, count, x_scales, x_sums, place, stride, scales, zeros, unit_places, is_first, sums
):
    """Take zero points off totals int32 [count, OUTPUTS] and add them, scaled, to sums float32 like them.

    The first row's scale and sum are at `place`, the next one's `stride` on. `unit_places` are where the scales and
    zero points of each unit's outputs begin. If this group is the first, sums begin with 0. Up to the scaling all is
    whole numbers below 2^24, so that float32 has them exactly. A flat array of scales is for whole outputs:
    `write_scaled` applies it.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        v = Builder(b, _ISA)
        totals, x_scales, x_sums, scales, zeros, sums = (
            array_data(context, b, signature, args, i) for i in (0, 2, 3, 6, 7, 10)
        )
        count, place, stride, offsets, is_first = args[1], args[4], args[5], cgutils.unpack_tuple(b, args[8]), args[9]
        scale_array, zero_type = signature.args[6], signature.args[7].dtype
        negative = [b.sitofp(b.neg(v.numbers(zeros, offset, zero_type)), v.f32) for offset in offsets]
        factors = [v.numbers(scales, offset, scale_array.dtype) for offset in offsets] if scale_array.ndim > 1 else []
        begins = b.icmp_signed("!=", is_first, ir.Constant(is_first.type, 0))

        def number(value: int) -> ir.Constant:
            return ir.Constant(count.type, value)

        def add_rows(before: Callable[[Any], Any]) -> None:
            with cgutils.for_range(b, count) as loop:
                row = b.add(place, b.mul(loop.index, stride))
                x_scale = v.splat(v.load(x_scales, row, F32))
                x_sum = v.splat(b.sitofp(v.load(x_sums, row, I32), F32))
                for unit in range(UNITS):
                    offset = b.add(b.mul(loop.index, number(OUTPUTS)), number(unit * LANES))
                    total = v.fma(negative[unit], x_sum, b.sitofp(v.load(totals, offset, v.i32), v.f32))
                    if factors:
                        total = v.fma(b.fmul(total, x_scale), factors[unit], before(offset))
                    else:
                        total = v.fma(total, x_scale, before(offset))
                    v.store(total, sums, offset)

        with b.if_else(begins) as (first, later):
            with first:
                add_rows(lambda offset: v.constant(v.f32, 0.0))
            with later:
                add_rows(lambda offset: v.load(sums, offset, v.f32))
        return context.get_dummy_value()

    i = types.intp
    return types.none(totals, i, x_scales, x_sums, i, i, scales, zeros, PLACES, i, sums), codegen


@intrinsic
def write_scaled(typing_context, sums, count, scales, unit_places, bias, out, row, tile, gates, width):  # type: ignore[no-untyped-def]
    """Write sums float32 [count, OUTPUTS] plus biases as rows of out from `row` on.

    Scales and `unit_places` are as in `scale_totals`, `gates` and `width` those of `gates_ops.write_tile`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        v = Builder(b, _ISA)
        sums, scales, bias, out = (array_data(context, b, signature, args, i) for i in (0, 2, 4, 5))
        count, row, tile, gates, width = (args[i] for i in (1, 6, 7, 8, 9))
        scale_array, offsets = signature.args[2], cgutils.unpack_tuple(b, args[3])
        factors = [v.numbers(scales, offset, scale_array.dtype) for offset in offsets] if scale_array.ndim == 1 else []
        columns = output_columns(b, tile, gates, UNITS, LANES)
        added = [v.load(bias, column, v.f32) for column in columns]
        with cgutils.for_range(b, count) as loop:
            start = b.mul(loop.index, ir.Constant(count.type, OUTPUTS))
            places = [b.add(start, ir.Constant(count.type, unit * LANES)) for unit in range(UNITS)]
            values = [v.load(sums, place, v.f32) for place in places]
            if factors:
                results = [v.fma(*each) for each in zip(values, factors, added, strict=True)]
            else:
                results = [b.fadd(value, more) for value, more in zip(values, added, strict=True)]
            write_tile(b, out, b.add(row, loop.index), [results], columns, gates, width)
        return context.get_dummy_value()

    i = types.intp
    return types.none(sums, i, scales, PLACES, bias, out, i, i, i, i), codegen
