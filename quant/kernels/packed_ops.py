"""The sums of `packed_cpu` for one row: inputs times 8-bit or 4-bit weights, in lanes as wide as the registers.

A weight is `integer * scale + shift`, rounded once to float32 in registers, and is then added as in the dense product:
a fused multiply-add for each lane, in order (`dense_ops`).
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from quant.kernels.dense_ops import WIDTH
from quant.kernels.simd import (
    I32,
    LANES,
    array_data,
    lanes,
    lanes16,
    lanes_at,
    splat16,
    vector_call,
    widened_bytes,
    zeros16,
)
from quant.kernels.simd import splat as splat8
from quant.kernels.simd import zeros as zeros8

zeros, splat, accumulator = (zeros16, splat16, lanes16) if WIDTH > LANES else (zeros8, splat8, lanes)


@intrinsic
def add_int8(typing_context: Any, x: Any, x0: Any, w: Any, w0: Any, scale: Any, shift: Any, total: Any) -> Any:
    """`total` plus the products of `WIDTH` inputs from x0 on and as many int8 weights from w0 on, or 8-bit floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_data, w_data = (array_data(context, builder, signature, args, index) for index in (0, 2))
        numbers = widened_bytes(builder, _bytes_at(builder, w_data, args[3], WIDTH), signature.args[2].dtype)
        a = lanes_at(builder, x_data, signature.args[0].dtype, args[1], WIDTH, WIDTH)
        weight = vector_call(builder, "fma", numbers, args[4], args[5])
        return vector_call(builder, "fma", a, weight, args[6])

    at = types.intp
    return accumulator(x, at, w, at, accumulator, accumulator, accumulator), codegen


@intrinsic
def add_int4(typing_context: Any, x: Any, x0: Any, w: Any, w0: Any, scale: Any, shift: Any, total: Any) -> Any:
    """`total` plus the products of 16 inputs from x0 on and the halves of 8 bytes of weights from w0 on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_data, w_data = (array_data(context, builder, signature, args, index) for index in (0, 2))
        pairs = _bytes_at(builder, w_data, args[3], LANES)
        low = builder.and_(pairs, ir.Constant(pairs.type, [15] * LANES))
        high = builder.lshr(pairs, ir.Constant(pairs.type, [4] * LANES))
        order = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))
        parts = [builder.shuffle_vector(low, high, order)] if WIDTH > LANES else [low, high]
        sums = args[6]
        for index, part in enumerate(parts):
            integers = builder.zext(part, ir.VectorType(I32, WIDTH))
            weight = vector_call(builder, "fma", builder.sitofp(integers, args[4].type), args[4], args[5])
            place = builder.add(args[1], ir.Constant(args[1].type, index * WIDTH))
            a = lanes_at(builder, x_data, signature.args[0].dtype, place, WIDTH, WIDTH)
            sums = vector_call(builder, "fma", a, weight, sums)
        return sums

    at = types.intp
    return accumulator(x, at, w, at, accumulator, accumulator, accumulator), codegen


def _bytes_at(builder: Any, data: Any, offset: Any, count: int) -> Any:
    vector = ir.VectorType(ir.IntType(8), count)
    value = builder.load(builder.bitcast(builder.gep(data, [offset]), vector.as_pointer()))
    value.align = 1
    return value
