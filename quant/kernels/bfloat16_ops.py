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
import math
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.simd import (
    EXP_TERMS,
    F32,
    I32,
    LOG2_E,
    array_data,
    enabled_features,
    next_tile_part,
    prefetch_at,
    spread,
    vector_call,
)

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


def round_two(b: Any, low: Any, high: Any) -> Any:
    """Two vectors of float32 as the nearest bfloat16, one after the other, by AVX512-BF16: words, pair by pair."""
    signature = ir.FunctionType(ir.VectorType(ir.IntType(16), 2 * LANES), [_FLOATS, _FLOATS])
    function = cgutils.get_or_insert_function(b.module, signature, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    return b.bitcast(b.call(function, [high, low]), _WORDS)


def short_exp(b: Any, x: Any) -> Any:
    """e^x, x not above 0, to 2^-14 of it, which is a small part of what rounding to bfloat16 takes; by AVX-512.

    Exactly 0 below -110; NaN stays NaN. The terms are those of the Taylor series to r^4.
    """

    def constant(value: float) -> ir.Constant:
        return ir.Constant(_FLOATS, [value] * LANES)

    lowest = constant(-110.0)
    bounded = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)
    exponent = vector_call(b, "rint", b.fmul(bounded, constant(LOG2_E)))
    rest = vector_call(b, "fma", exponent, constant(-math.log(2)), bounded)
    total, *others = (constant(term) for term in EXP_TERMS[-5:])
    for term in others:
        total = vector_call(b, "fma", total, rest, term)
    mask = ir.IntType(LANES)
    signature = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, _FLOATS, mask, I32])
    scale = cgutils.get_or_insert_function(b.module, signature, "llvm.x86.avx512.mask.scalef.ps.512")
    return b.call(scale, [total, exponent, total, ir.Constant(mask, -1), ir.Constant(I32, 4)])


def _halves(b: Any, words: Any) -> tuple[Any, Any]:
    """The first and the second number of each pair, as float32."""
    upper, sixteen = (ir.Constant(_WORDS, [value] * LANES) for value in (-1 << 16, 16))
    return b.bitcast(b.shl(words, sixteen), _FLOATS), b.bitcast(b.and_(words, upper), _FLOATS)


@intrinsic
def multiply_block(  # type: ignore[no-untyped-def]
    typing_context, x, x0, w, bias, out, row, rows, tile, n_size, k_size, part, parts
):
    """`rows` rows, at least one and at most `ROWS`, times a tile of `OUTPUTS` outputs.

    x [pairs of inputs, rows] as words from x0 on, or float32 [pairs, 2, rows]; w uint16 [tiles, pairs, OUTPUTS, 2];
    bias [n_size], out [*, n_size] float32. The rows of out begin with `row`; `tile` counts tiles of outputs.

    One `part` of `parts` of the next tile's weights is asked for meanwhile (`work_split.fetched_part`).
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        data = [array_data(context, b, signature, args, i) for i in (0, 2, 3, 4)]
        sizes = [args[i] for i in (1, 5, 7, 8, 9, 10, 11)]
        is_paired = signature.args[0].dtype == types.uint32
        end = b.append_basic_block("end")
        unreachable = b.append_basic_block("others")
        switch = b.switch(args[6], unreachable)
        for count in range(1, ROWS + 1):
            block = b.append_basic_block(f"rows{count}")
            switch.add_case(ir.Constant(args[6].type, count), block)
            b.position_at_end(block)
            _multiply(b, *data, *sizes, rows=count, is_paired=is_paired)
            b.branch(end)
        b.position_at_end(unreachable)
        b.unreachable()
        b.position_at_end(end)
        return context.get_dummy_value()

    at = types.intp
    return types.none(x, at, w, bias, out, at, at, at, at, at, at, at), codegen


def _multiply(
    b: Any,
    x: Any,
    w: Any,
    bias: Any,
    out: Any,
    x0: Any,
    row: Any,
    tile: Any,
    n_size: Any,
    k_size: Any,
    part: Any,
    parts: Any,
    *,
    rows: int,
    is_paired: bool,
) -> None:
    """The code for so many rows; x, w, bias, out are typed pointers."""

    def number(value: int) -> ir.Constant:
        return ir.Constant(k_size.type, value)

    def at(data: Any, *offsets: Any) -> Any:
        return b.gep(data, [functools.reduce(b.add, offsets)])

    def vector(place: Any, kind: Any) -> Any:
        value = b.load(b.bitcast(place, kind.as_pointer()))
        value.align = 2
        return value

    zero = ir.Constant(_FLOATS, [0.0] * LANES)
    sums = [[cgutils.alloca_once_value(b, zero) for _ in range(UNITS)] for _ in range(rows)]
    tile_size = b.mul(number(OUTPUTS), k_size)
    w0 = b.mul(tile, tile_size)
    fetched, step = next_tile_part(b, w0, tile_size, part, parts, LANES * INPUTS)
    with cgutils.for_range(b, b.sdiv(k_size, number(INPUTS))) as loop:
        w_at = b.add(w0, b.mul(loop.index, number(OUTPUTS * INPUTS)))
        for unit in range(UNITS):
            line = b.add(b.mul(loop.index, number(UNITS)), number(unit))
            prefetch_at(b, w, b.add(fetched, b.mul(line, step)))
        weights = [vector(at(w, w_at, number(unit * LANES * INPUTS)), _WORDS) for unit in range(UNITS)]
        halves = [] if is_paired else [_halves(b, words) for words in weights]
        x_at = b.add(x0, b.mul(loop.index, number(rows if is_paired else INPUTS * rows)))
        for r, places in enumerate(sums):
            numbers = [
                spread(b, b.load(at(x, x_at, number(half * rows + r))), LANES) for half in range(1 if is_paired else 2)
            ]
            for unit, place in enumerate(places):
                total = b.load(place)
                if is_paired:
                    total = add_pair(b, numbers[0], weights[unit], total)
                else:
                    total = vector_call(b, "fma", numbers[1], halves[unit][1], total)
                    total = vector_call(b, "fma", numbers[0], halves[unit][0], total)
                b.store(total, place)
    for unit in range(UNITS):
        n = b.add(b.mul(tile, number(OUTPUTS)), number(unit * LANES))
        added = vector(at(bias, n), _FLOATS)
        for r, places in enumerate(sums):
            place = at(out, b.mul(b.add(row, number(r)), n_size), n)
            written = b.store(b.fadd(b.load(places[unit]), added), b.bitcast(place, _FLOATS.as_pointer()))
            written.align = 4
