"""The inner products of `bfloat16_cpu`: some rows times a tile of outputs, whose sums fill AVX-512's registers.

A vector holds `LANES` outputs of two inputs each, in bfloat16; it is multiplied with the same two inputs of a row,
broadcast, and the products of a lane are added to a float32: the second one first, each as a fused multiply-add.
AVX512-BF16 has one instruction for both. Elsewhere they are two, with the same bits but where a number is below 2^-126,
which that instruction takes for 0; activations are stored as float32 there, so that none is taken apart per product.
All functions here work inside `numba.njit` only, on flat C-contiguous arrays and element offsets; nothing is
bounds-checked.
"""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.simd import F32, I32, array_data, enabled_features, spread, vector_call

LANES, UNITS = 16, 2
OUTPUTS = LANES * UNITS
"""Outputs of a tile."""
INPUTS = 2
"""Inputs whose products with one output share a lane."""
ROWS = 12
"""Rows at most, whose sums take 24 of 32 registers: weights take two, or four where they are taken apart."""
HAS_PAIRS = "avx512bf16" in enabled_features()
"""Whether one instruction adds a pair of products."""
ACTIVATION = np.uint32 if HAS_PAIRS else np.float32
"""How activations are stored: pairs of bfloat16 as words, or numbers as float32, which are bfloat16 exactly."""

_FLOATS, _WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


def add_pair(b: Any, x: Any, w: Any, total: Any) -> Any:
    """total + two products for every lane, by AVX512-BF16; x and w words."""
    signature = ir.FunctionType(_FLOATS, [_FLOATS, _WORDS, _WORDS])
    function = cgutils.get_or_insert_function(b.module, signature, "llvm.x86.avx512bf16.dpbf16ps.512")
    return b.call(function, [total, x, w])


def _halves(b: Any, words: Any) -> tuple[Any, Any]:
    """The first and the second number of each pair, as float32."""
    upper, sixteen = (ir.Constant(_WORDS, [value] * LANES) for value in (-1 << 16, 16))
    return b.bitcast(b.shl(words, sixteen), _FLOATS), b.bitcast(b.and_(words, upper), _FLOATS)


def make_tile(rows: int) -> Any:
    """`rows` rows times `OUTPUTS` outputs, as a Numba intrinsic.

    x [pairs of inputs, rows] as words from x0 on, or float32 [pairs, 2, rows]; w uint16 [tiles, pairs, OUTPUTS, 2];
    bias [n_size], out [*, n_size] float32. The rows of out begin with `row`; `tile` counts tiles of outputs.
    """

    @intrinsic
    def tile(typing_context, x, x0, w, bias, out, row, tile, n_size, k_size):  # type: ignore[no-untyped-def]
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x_data, w_data, bias_data, out_data = (array_data(context, b, signature, args, i) for i in (0, 2, 3, 4))
            x0, row, tile, n_size, k_size = (args[i] for i in (1, 5, 6, 7, 8))
            is_paired = signature.args[0].dtype == types.uint32

            def number(value: int) -> ir.Constant:
                return ir.Constant(k_size.type, value)

            def at(data: Any, *offsets: Any) -> Any:
                return b.gep(data, [functools.reduce(b.add, offsets)])

            def vector(place: Any, kind: Any) -> Any:
                value = b.load(b.bitcast(place, kind.as_pointer()))
                value.align = 2
                return value

            sums = [
                [cgutils.alloca_once_value(b, ir.Constant(_FLOATS, [0.0] * LANES)) for _ in range(UNITS)]
                for _ in range(rows)
            ]
            w0 = b.mul(tile, b.mul(number(OUTPUTS), k_size))
            with cgutils.for_range(b, b.sdiv(k_size, number(INPUTS))) as loop:
                w_at = b.add(w0, b.mul(loop.index, number(OUTPUTS * INPUTS)))
                weights = [vector(at(w_data, w_at, number(unit * LANES * INPUTS)), _WORDS) for unit in range(UNITS)]
                halves = [] if is_paired else [_halves(b, words) for words in weights]
                x_at = b.add(x0, b.mul(loop.index, number(rows if is_paired else INPUTS * rows)))
                for r, places in enumerate(sums):
                    if is_paired:
                        pair = spread(b, b.load(at(x_data, x_at, number(r))), LANES)
                    else:
                        first, second = (
                            spread(b, b.load(at(x_data, x_at, number(half * rows + r))), LANES)
                            for half in range(INPUTS)
                        )
                    for unit, place in enumerate(places):
                        total = b.load(place)
                        if is_paired:
                            total = add_pair(b, pair, weights[unit], total)
                        else:
                            total = vector_call(b, "fma", second, halves[unit][1], total)
                            total = vector_call(b, "fma", first, halves[unit][0], total)
                        b.store(total, place)
            for unit in range(UNITS):
                n = b.add(b.mul(tile, number(OUTPUTS)), number(unit * LANES))
                added = vector(at(bias_data, n), _FLOATS)
                for r, places in enumerate(sums):
                    place = at(out_data, b.mul(b.add(row, number(r)), n_size), n)
                    written = b.store(b.fadd(b.load(places[unit]), added), b.bitcast(place, _FLOATS.as_pointer()))
                    written.align = 4
            return context.get_dummy_value()

        intp = types.intp
        return types.none(x, intp, w, bias, out, intp, intp, intp, intp), codegen

    return tile
