"""The inner products of `bfloat16_cpu`: some rows times a tile of outputs, whose sums fill AVX-512's registers.

A vector holds `LANES` outputs of two inputs each, in bfloat16; it is multiplied with the same two inputs of a row,
broadcast, and the products of a lane are added to a float32: the second one first, each as a fused multiply-add.
AVX512-BF16 has one instruction for both. Elsewhere they are two, with the same bits but where a number is below 2^-126,
which that instruction takes for 0; activations are stored as float32 there, so that none is taken apart per product.
All functions here work inside `numba.njit` only, on flat C-contiguous arrays and element offsets; nothing is
bounds-checked.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.gates_ops import output_columns, write_tile
from quant.kernels.simd import (
    EXP_TERMS,
    F32,
    I32,
    LOG2_E,
    array_data,
    bfloat16_bits,
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
ROUNDED = np.uint16 if HAS_PAIRS else np.float32
"""How rounded activations are stored: as the bits of a bfloat16, or widened again."""

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
def round_vector(typing_context, x, rounded, place):  # type: ignore[no-untyped-def]
    """Write the nearest bfloat16 of `LANES` numbers of x float32, from `place` on, to `rounded`, of dtype `ROUNDED`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target = (b.gep(array_data(context, b, signature, args, i), [args[2]]) for i in (0, 1))
        value = b.load(b.bitcast(source, _FLOATS.as_pointer()))
        value.align = 4
        if signature.args[1].dtype == types.uint16:
            halves = ir.VectorType(ir.IntType(16), LANES)
            function = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(halves, [_FLOATS]), "llvm.x86.avx512bf16.cvtneps2bf16.512"
            )
            result = b.call(function, [value])
        else:
            bits = b.zext(bfloat16_bits(b, value), _WORDS)
            result = b.bitcast(b.shl(bits, ir.Constant(_WORDS, [16] * LANES)), _FLOATS)
        b.store(result, b.bitcast(target, result.type.as_pointer())).align = 2
        return context.get_dummy_value()

    return types.none(x, rounded, types.intp), codegen


@intrinsic
def multiply_block(  # type: ignore[no-untyped-def]
    typing_context, x, w, bias, out, waiting, place, row, rows, tile, gates, width, k_size, first, last, part, parts
):
    """`rows` rows, at least one and at most `ROWS`, times inputs `first : last` of a tile of `OUTPUTS` outputs.

    x [*, k_size] as `round_vector` makes it; w uint16 [tiles, input pairs, OUTPUTS, 2]; bias [outputs]; out [*, width]
    float32. The rows begin with `row`; `tile` counts tiles of outputs; `gates` and `width` are those of
    `gates_ops.write_tile`. Until the last inputs the sums wait in `waiting` float32, [rows, OUTPUTS] from `place` on.

    One `part` of `parts` of as many weights that follow is asked for meanwhile (`work_split.fetched_part`).
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        data = [array_data(context, b, signature, args, i) for i in range(5)]
        count, sizes = args[7], [*args[5:7], *args[8:]]
        is_paired = signature.args[0].dtype == types.uint16
        end = b.append_basic_block("end")
        unreachable = b.append_basic_block("others")
        switch = b.switch(count, unreachable)
        for rows in range(1, ROWS + 1):
            block = b.append_basic_block(f"rows{rows}")
            switch.add_case(ir.Constant(count.type, rows), block)
            b.position_at_end(block)
            _multiply(b, *data, *sizes, rows=rows, is_paired=is_paired)
            b.branch(end)
        b.position_at_end(unreachable)
        b.unreachable()
        b.position_at_end(end)
        return context.get_dummy_value()

    at = types.intp
    return types.none(x, w, bias, out, waiting, *[at] * 11), codegen


@contextlib.contextmanager
def _loop_as_written(b: Any, count: Any) -> Iterator[Any]:
    """`cgutils.for_range` that LLVM does not unroll: with two turns at once it would run out of registers."""
    with cgutils.for_range(b, count) as loop:
        yield loop
        last = b.block
    unrolling = b.module.add_metadata(["llvm.loop.unroll.disable"])
    node = b.module.add_metadata([unrolling, last.name])  # no other loop's node
    node.operands = [node, unrolling]  # LLVM wants a loop's node to refer to itself first
    last.terminator.set_metadata("llvm.loop", node)


def _multiply(
    b: Any,
    x: Any,
    w: Any,
    bias: Any,
    out: Any,
    waiting: Any,
    place: Any,
    row: Any,
    tile: Any,
    gates: Any,
    width: Any,
    k_size: Any,
    first: Any,
    last: Any,
    part: Any,
    parts: Any,
    *,
    rows: int,
    is_paired: bool,
) -> None:
    """The code for so many rows; x, w, bias, out, waiting are typed pointers."""

    def number(value: int) -> ir.Constant:
        return ir.Constant(k_size.type, value)

    def at(data: Any, *offsets: Any) -> Any:
        return b.gep(data, [functools.reduce(b.add, offsets)])

    def vector(place: Any, kind: Any) -> Any:
        value = b.load(b.bitcast(place, kind.as_pointer()))
        value.align = 2
        return value

    def waiting_place(r: int, unit: int) -> Any:
        return at(waiting, place, number(r * OUTPUTS + unit * LANES))

    zero = ir.Constant(_FLOATS, [0.0] * LANES)
    sums = [[cgutils.alloca_once_value(b, zero) for _ in range(UNITS)] for _ in range(rows)]
    with b.if_then(b.icmp_signed(">", first, number(0))):
        for r, places in enumerate(sums):
            for unit, kept in enumerate(places):
                b.store(vector(waiting_place(r, unit), _FLOATS), kept)
    w0 = b.mul(number(OUTPUTS), b.add(b.mul(tile, k_size), first))
    num_inputs = b.sub(last, first)
    fetched, step = next_tile_part(b, w0, b.mul(number(OUTPUTS), num_inputs), part, parts, LANES * INPUTS)
    x_rows = [at(x, b.mul(b.add(row, number(r)), k_size), first) for r in range(rows)]
    with _loop_as_written(b, b.sdiv(num_inputs, number(INPUTS))) as loop:
        w_at = b.add(w0, b.mul(loop.index, number(OUTPUTS * INPUTS)))
        for unit in range(UNITS):
            line = b.add(b.mul(loop.index, number(UNITS)), number(unit))
            prefetch_at(b, w, b.add(fetched, b.mul(line, step)))
        weights = [vector(at(w, w_at, number(unit * LANES * INPUTS)), _WORDS) for unit in range(UNITS)]
        halves = [] if is_paired else [_halves(b, words) for words in weights]
        x_at = b.mul(loop.index, number(INPUTS))
        for r, places in enumerate(sums):
            pair = at(x_rows[r], x_at)
            if is_paired:
                numbers = [spread(b, b.load(b.bitcast(pair, I32.as_pointer())), LANES)]
            else:
                numbers = [spread(b, b.load(at(pair, number(half))), LANES) for half in range(INPUTS)]
            for unit, kept in enumerate(places):
                total = b.load(kept)
                if is_paired:
                    total = add_pair(b, numbers[0], weights[unit], total)
                else:
                    total = vector_call(b, "fma", numbers[1], halves[unit][1], total)
                    total = vector_call(b, "fma", numbers[0], halves[unit][0], total)
                b.store(total, kept)
    with b.if_else(b.icmp_signed("<", last, k_size)) as (going_on, ending):
        with going_on:
            for r, places in enumerate(sums):
                for unit, kept in enumerate(places):
                    b.store(b.load(kept), b.bitcast(waiting_place(r, unit), _FLOATS.as_pointer())).align = 4
        with ending:
            columns = output_columns(b, tile, gates, UNITS, LANES)
            added = [vector(at(bias, column), _FLOATS) for column in columns]
            results = [
                [b.fadd(b.load(kept), more) for kept, more in zip(places, added, strict=True)] for places in sums
            ]
            write_tile(b, out, row, results, columns, gates, width)
