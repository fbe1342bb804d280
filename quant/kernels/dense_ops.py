"""Register tiles of the dense product, and the two ways in which they add.

A tile is some rows of x times some rows of w: an accumulator of float32 lanes for each pair, to which the inputs are
added step by step, in order. All tiles add so, whatever their shape: a row's bits do not depend on the tile it is in.

`FLOATS`: a step is `WIDTH` inputs and one fused multiply-add; the last lanes of an input size that is no multiple of
them add zeros. The bits depend on `WIDTH`, and so on the processor.

`PAIRS`: a step is 32 inputs in bfloat16, two to each of 16 lanes, and two fused multiply-adds, of the second input of a
pair first. AVX512-BF16 has one instruction for them. Elsewhere they are two, with the same bits but where a number is
below 2^-126, which that instruction takes for 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.simd import (
    F32,
    HAS_AVX512,
    I32,
    LANES,
    array_data,
    enabled_features,
    fold_sum,
    lanes_at,
    prefetch_at,
    vector_call,
)

WIDTH = 2 * LANES if HAS_AVX512 else LANES
"""Lanes of an accumulator of floats: one register with AVX-512 and with AVX, two with NEON."""
HAS_PAIRS = "avx512bf16" in enabled_features()
"""Whether one instruction adds pairs of bfloat16."""


@dataclasses.dataclass(frozen=True, slots=True)
class Products:
    """A way to add: `inputs` a step to `lanes` sums."""

    inputs: int
    lanes: int
    load: Callable[..., Any]
    """Makes of (builder, typed pointer, dtype, offset, count) the inputs of a step, of which there are `count`."""
    add: Callable[..., Any]
    """Makes of (builder, inputs, weights, sums) the new sums."""


def _load_floats(b: Any, data: Any, dtype: Any, offset: Any, count: int) -> Any:
    return lanes_at(b, data, dtype, offset, count, WIDTH)


def _add_floats(b: Any, x: Any, w: Any, total: Any) -> Any:
    return vector_call(b, "fma", x, w, total)


PAIR_LANES = 16
_FLOATS, _INTEGERS = ir.VectorType(F32, PAIR_LANES), ir.VectorType(I32, PAIR_LANES)


def _load_pairs(b: Any, data: Any, dtype: Any, offset: Any, count: int) -> Any:
    pairs = b.load(b.bitcast(b.gep(data, [offset]), _INTEGERS.as_pointer()))
    pairs.align = dtype.bitwidth // 8
    return pairs


def _add_pairs(b: Any, x: Any, w: Any, total: Any) -> Any:
    if HAS_PAIRS:
        signature = ir.FunctionType(_FLOATS, [_FLOATS, _INTEGERS, _INTEGERS])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return b.call(cgutils.get_or_insert_function(b.module, signature, name), [total, x, w])
    upper, sixteen = (ir.Constant(_INTEGERS, [value] * PAIR_LANES) for value in (-1 << 16, 16))
    second = [b.bitcast(b.and_(pairs, upper), _FLOATS) for pairs in (x, w)]
    first = [b.bitcast(b.shl(pairs, sixteen), _FLOATS) for pairs in (x, w)]
    return vector_call(b, "fma", *first, vector_call(b, "fma", *second, total))


FLOATS = Products(WIDTH, WIDTH, _load_floats, _add_floats)
PAIRS = Products(2 * PAIR_LANES, PAIR_LANES, _load_pairs, _add_pairs)


def make_tile(rows: int, outputs: int, ahead: int, products: Products = FLOATS) -> Any:
    """`rows` rows of x times `outputs` rows of w, as a Numba intrinsic.

    x, w flat arrays, of which the first rows begin at x0 and w0; the result of the first pair goes to out[o0], after
    bias[n] was added. Weights are asked for `ahead` rows before their use; 0: the processor is left to guess. The
    number of inputs is a multiple of `LANES`, and of a step's inputs where that is more than 16.
    """
    step = products.inputs

    @intrinsic
    def tile(typing_context, x, x0, w, w0, k_size, bias, n, out, o0, n_size):  # type: ignore[no-untyped-def]
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x_data, w_data, bias_data, out_data = (array_data(context, b, signature, args, i) for i in (0, 2, 5, 7))
            x_type, w_type = signature.args[0].dtype, signature.args[2].dtype
            x0, w0, k_size, n, o0, n_size = (args[i] for i in (1, 3, 4, 6, 8, 9))

            def number(value: int) -> ir.Constant:
                return ir.Constant(k_size.type, value)

            def starts(first: Any, stride: Any, count: int) -> list[Any]:
                return [b.add(first, b.mul(stride, number(i))) for i in range(count)]

            x_rows, w_rows = starts(x0, k_size, rows), starts(w0, k_size, outputs)
            zero = ir.Constant(ir.VectorType(F32, products.lanes), [0.0] * products.lanes)
            sums = [[cgutils.alloca_once_value(b, zero) for _ in w_rows] for _ in x_rows]

            def add_products(k: Any, count: int) -> None:
                """Add those of `count` inputs from k on."""
                weights = [products.load(b, w_data, w_type, b.add(start, k), count) for start in w_rows]
                for start, row_sums in zip(x_rows, sums, strict=True):
                    a = products.load(b, x_data, x_type, b.add(start, k), count)
                    for weight, place in zip(weights, row_sums, strict=True):
                        b.store(products.add(b, a, weight, b.load(place)), place)

            with cgutils.for_range(b, b.sdiv(k_size, number(step))) as loop:
                k = b.mul(loop.index, number(step))
                if ahead:
                    prefetch_at(b, w_data, b.add(w0, b.mul(number(ahead), b.add(k_size, k))))
                add_products(k, step)
            if step == 2 * LANES:
                rest = b.srem(k_size, number(step))
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
