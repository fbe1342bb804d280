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

    @intrinsic
    def tile(typing_context, x, x0, w, w0, k_size, bias, n, out, o0, n_size):  # type: ignore[no-untyped-def]
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x_data, w_data, bias_data, out_data = (array_data(context, b, signature, args, i) for i in (0, 2, 5, 7))
            x0, w0, k_size, n, o0, n_size = (args[i] for i in (1, 3, 4, 6, 8, 9))
            x_place, w_place = (x_data, signature.args[0].dtype, x0), (w_data, signature.args[2].dtype, w0)
            body = _Tile(b, products, x_place, w_place, rows, outputs, k_size)
            body.add(body.number(0), k_size, ahead)
            body.write(bias_data, n, out_data, o0, n_size)
            return context.get_dummy_value()

        at = types.intp
        return types.none(x, at, w, at, at, bias, at, out, at, at), codegen

    return tile


def make_part_tile(rows: int, outputs: int, products: Products = FLOATS) -> Any:
    """As `make_tile`, but only the inputs from `first_k` to `last_k` are added.

    Between the parts the sums are kept in `sums` [rows * outputs * lanes] from s0 on.
    """

    @intrinsic
    def tile(typing_context, x, x0, w, w0, k_size, first_k, last_k, sums, s0, bias, n, out, o0, n_size):  # type: ignore[no-untyped-def]
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x_data, w_data, sums_data, bias_data, out_data = (
                array_data(context, b, signature, args, i) for i in (0, 2, 7, 9, 11)
            )
            x0, w0, k_size, first_k, last_k, s0, n, o0, n_size = (args[i] for i in (1, 3, 4, 5, 6, 8, 10, 12, 13))
            x_place, w_place = (x_data, signature.args[0].dtype, x0), (w_data, signature.args[2].dtype, w0)
            body = _Tile(b, products, x_place, w_place, rows, outputs, k_size)
            kept = b.gep(sums_data, [s0])
            body.take(kept, b.icmp_signed("==", first_k, body.number(0)))
            body.add(first_k, last_k, 0)
            with b.if_else(b.icmp_signed("==", last_k, k_size)) as (is_last, is_earlier):
                with is_last:
                    body.write(bias_data, n, out_data, o0, n_size)
                with is_earlier:
                    body.keep(kept)
            return context.get_dummy_value()

        at = types.intp
        return types.none(x, at, w, at, at, at, at, sums, at, bias, at, out, at, at), codegen

    return tile


class _Tile:
    """The code of a tile: an accumulator for each pair of `rows` rows of x and `outputs` rows of w."""

    def __init__(self, b: Any, products: Products, x: Any, w: Any, rows: int, outputs: int, k_size: Any) -> None:
        """x and w are typed pointers with the dtype and the offset of the first row."""
        self._b, self._products, self._x, self._w, self._k_size = b, products, x, w, k_size
        self._x_rows, self._w_rows = self._starts(x[2], k_size, rows), self._starts(w[2], k_size, outputs)
        self._zero = ir.Constant(ir.VectorType(F32, products.lanes), [0.0] * products.lanes)
        self._sums = [[cgutils.alloca_once_value(b, self._zero) for _ in range(outputs)] for _ in range(rows)]

    def number(self, value: int) -> ir.Constant:
        return ir.Constant(self._k_size.type, value)

    def _starts(self, first: Any, stride: Any, count: int) -> list[Any]:
        return [self._b.add(first, self._b.mul(stride, self.number(i))) for i in range(count)]

    def add(self, first_k: Any, last_k: Any, ahead: int) -> None:
        """Add the products of the inputs from `first_k` to `last_k`."""
        b, step = self._b, self._products.inputs
        with cgutils.for_range(b, b.sdiv(b.sub(last_k, first_k), self.number(step))) as loop:
            k = b.add(first_k, b.mul(loop.index, self.number(step)))
            if ahead:
                prefetch_at(b, self._w[0], b.add(self._w[2], b.mul(self.number(ahead), b.add(self._k_size, k))))
            self._add_step(k, step)
        if step == 2 * LANES:
            rest = b.srem(b.sub(last_k, first_k), self.number(step))
            with b.if_then(b.icmp_signed("!=", rest, self.number(0)), likely=False):
                self._add_step(b.sub(last_k, rest), LANES)

    def _add_step(self, k: Any, count: int) -> None:
        b, products = self._b, self._products
        weights = [products.load(b, *self._w[:2], b.add(start, k), count) for start in self._w_rows]
        for start, row_sums in zip(self._x_rows, self._sums, strict=True):
            a = products.load(b, *self._x[:2], b.add(start, k), count)
            for weight, place in zip(weights, row_sums, strict=True):
                b.store(products.add(b, a, weight, b.load(place)), place)

    def _kept(self, data: Any) -> list[tuple[Any, Any]]:
        """Each accumulator with its place in memory."""
        places = [place for row in self._sums for place in row]
        kept = self._b.bitcast(data, self._zero.type.as_pointer())
        return [(place, self._b.gep(kept, [self.number(i)])) for i, place in enumerate(places)]

    def take(self, data: Any, is_first: Any) -> None:
        """Go on with the sums that were kept, or begin with zeros."""
        for place, kept in self._kept(data):
            value = self._b.load(kept)
            value.align = 4
            self._b.store(self._b.select(is_first, self._zero, value), place)

    def keep(self, data: Any) -> None:
        for place, kept in self._kept(data):
            self._b.store(self._b.load(place), kept).align = 4

    def write(self, bias: Any, n: Any, out: Any, o0: Any, n_size: Any) -> None:
        """Fold the sums, add the biases from `n` on, write them to `out` from o0 on."""
        b = self._b
        for o, row_sums in zip(self._starts(o0, n_size, len(self._sums)), self._sums, strict=True):
            for i, place in enumerate(row_sums):
                added = b.load(b.gep(bias, [b.add(n, self.number(i))]))
                total = b.fadd(fold_sum(b, b.load(place)), added)
                b.store(total, b.gep(out, [b.add(o, self.number(i))]))
