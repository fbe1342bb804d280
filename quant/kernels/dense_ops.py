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

from quant.kernels.simd import F32, HAS_AVX512, LANES, array_data, fold_sum, lanes_at, prefetch_at, vector_call

WIDTH = 2 * LANES if HAS_AVX512 else LANES
"""Lanes of an accumulator: one register with AVX-512 and with AVX, two with NEON."""


def make_tile(rows: int, outputs: int, ahead: int) -> Any:
    """`rows` rows of x times `outputs` rows of w, as a Numba intrinsic.

    x, w flat arrays, of which the first rows begin at x0 and w0; the result of the first pair goes to out[o0], after
    bias[n] was added. Weights are asked for `ahead` rows before their use; 0: the processor is left to guess.
    """

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
