"""Register tiles of the dense product in float32, as wide as the processor's registers.

A tile is some rows of x times some rows of w: an accumulator of `WIDTH` float32 lanes for each pair, to which every
`WIDTH` inputs add one fused multiply-add, in order; the last lanes of an input size that is no multiple of them add
zeros. All tiles add so, whatever their shape: a row's bits do not depend on the tile it is in. They do depend on
`WIDTH`, and so on the processor.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.integer_ops import enabled_features
from quant.kernels.simd import (
    F32,
    I32,
    LANES,
    fold_sum,
    lanes,
    lanes16,
    lanes_at,
    prefetch_at,
    splat16,
    vector_call,
    zeros16,
)
from quant.kernels.simd import splat as splat8
from quant.kernels.simd import zeros as zeros8

WIDTH = 2 * LANES if "avx512f" in enabled_features() else LANES
"""Lanes of an accumulator: one register with AVX-512 and with AVX, two with NEON."""


def _data(context: Any, builder: Any, signature: Any, args: Any, index: int) -> Any:
    return context.make_array(signature.args[index])(context, builder, value=args[index]).data


def make_tile(rows: int, outputs: int, ahead: int) -> Any:
    """`rows` rows of x times `outputs` rows of w, as a Numba intrinsic.

    x, w flat arrays, of which the first rows begin at x0 and w0; the result of the first pair goes to out[o0], after
    bias[n] was added. Weights are asked for `ahead` rows before their use; 0: the processor is left to guess.
    """

    @intrinsic
    def tile(typing_context, x, x0, w, w0, k_size, bias, n, out, o0, n_size):  # type: ignore[no-untyped-def]
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x_data, w_data, bias_data, out_data = (_data(context, b, signature, args, i) for i in (0, 2, 5, 7))
            x_type, w_type = signature.args[0].dtype, signature.args[2].dtype
            x0, w0, k_size, n, o0, n_size = (args[i] for i in (1, 3, 4, 6, 8, 9))

            def number(value: int) -> ir.Constant:
                return ir.Constant(k_size.type, value)

            def starts(first: Any, stride: Any, count: int) -> list[Any]:
                return [b.add(first, b.mul(stride, number(i))) for i in range(count)]

            x_rows, w_rows = starts(x0, k_size, rows), starts(w0, k_size, outputs)
            zero = ir.Constant(ir.VectorType(F32, WIDTH), [0.0] * WIDTH)
            sums = [[cgutils.alloca_once_value(b, zero) for _ in w_rows] for _ in x_rows]

            def add_products(k: Any, count: int) -> None:
                """Add those of `count` inputs from k on."""
                weights = [lanes_at(b, w_data, w_type, b.add(start, k), count, WIDTH) for start in w_rows]
                for start, row_sums in zip(x_rows, sums, strict=True):
                    a = lanes_at(b, x_data, x_type, b.add(start, k), count, WIDTH)
                    for weight, place in zip(weights, row_sums, strict=True):
                        b.store(vector_call(b, "fma", a, weight, b.load(place)), place)

            with cgutils.for_range(b, b.sdiv(k_size, number(WIDTH))) as loop:
                k = b.mul(loop.index, number(WIDTH))
                if ahead:
                    prefetch_at(b, w_data, b.add(w0, b.mul(number(ahead), b.add(k_size, k))))
                add_products(k, WIDTH)
            if WIDTH > LANES:
                rest = b.srem(k_size, number(WIDTH))
                with b.if_then(b.icmp_signed("!=", rest, number(0)), likely=False):
                    add_products(b.sub(k_size, rest), LANES)
            for o, row_sums in zip(starts(o0, n_size, rows), sums, strict=True):
                for i, place in enumerate(row_sums):
                    added = b.load(b.gep(bias_data, [b.add(n, number(i))]))
                    total = b.fadd(fold_sum(b, b.load(place)), added)
                    b.store(total, b.gep(out_data, [b.add(o, number(i))]))
            return context.get_dummy_value()

        at = types.intp
        return types.none(x, at, w, at, at, bias, at, out, at, at), codegen

    return tile


zeros, splat, accumulator = (zeros16, splat16, lanes16) if WIDTH > LANES else (zeros8, splat8, lanes)


def _widened(builder: Any, integers: Any, scale: Any, shift: Any) -> Any:
    """`integers * scale + shift`, rounded once."""
    return vector_call(builder, "fma", builder.sitofp(integers, scale.type), scale, shift)


@intrinsic
def add_int8(typing_context: Any, x: Any, x0: Any, w: Any, w0: Any, scale: Any, shift: Any, total: Any) -> Any:
    """`total` plus the products of `WIDTH` inputs from x0 on and as many int8 weights from w0 on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_data, w_data = (_data(context, builder, signature, args, index) for index in (0, 2))
        integers = builder.sext(_bytes_at(builder, w_data, args[3], WIDTH), ir.VectorType(I32, WIDTH))
        a = lanes_at(builder, x_data, signature.args[0].dtype, args[1], WIDTH, WIDTH)
        return vector_call(builder, "fma", a, _widened(builder, integers, args[4], args[5]), args[6])

    at = types.intp
    return accumulator(x, at, w, at, accumulator, accumulator, accumulator), codegen


@intrinsic
def add_int4(typing_context: Any, x: Any, x0: Any, w: Any, w0: Any, scale: Any, shift: Any, total: Any) -> Any:
    """`total` plus the products of 16 inputs from x0 on and the halves of 8 bytes of weights from w0 on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_data, w_data = (_data(context, builder, signature, args, index) for index in (0, 2))
        pairs = _bytes_at(builder, w_data, args[3], LANES)
        low = builder.and_(pairs, ir.Constant(pairs.type, [15] * LANES))
        high = builder.lshr(pairs, ir.Constant(pairs.type, [4] * LANES))
        order = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))
        parts = [builder.shuffle_vector(low, high, order)] if WIDTH > LANES else [low, high]
        sums = args[6]
        for index, part in enumerate(parts):
            weight = _widened(builder, builder.zext(part, ir.VectorType(I32, WIDTH)), args[4], args[5])
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
