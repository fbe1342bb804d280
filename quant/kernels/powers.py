"""Powers of e and of 2 for every lane of float32 vectors, as LLVM operations and as Numba intrinsics.

A power is 2^n times that of the rest, which a polynomial gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.simd import I32, vector_call

# The terms of the Taylor series to r^7, whose rest is under 6e-9 where |r| <= ln(2) / 2, as that of 2^r is to r = 1/2.
_EXP_TERMS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_EXP2_TERMS = tuple(term * math.log(2) ** power for term, power in zip(_EXP_TERMS, range(7, -1, -1), strict=True))
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# The polynomial that is 1 at 0 and has the smallest maximal error from 0 to 1.
_SHORT_EXP2_TERMS = 0.013426684351874774, 0.05224247404231952, 0.2412802048802493, 0.693044844875136, 1.0
_TO_FLOOR = 9
"""The control byte of `vreduceps`: take away the next lower whole number (bits 1:0 are 01), raise no flag (bit 3)."""


def _constant(value: float, like: ir.VectorType) -> ir.Constant:
    """`value` in every lane."""
    return ir.Constant(like, [value] * like.count)


def exp_of(b: Any, x: Any) -> Any:
    """e^x of every lane, to about a unit in the last place; exactly 0 below -87, saturating above 88; NaN stays NaN."""
    bounded = _bounded(b, x, -87.0, 88.0)
    exponent = vector_call(b, "rint", b.fmul(bounded, _constant(math.log2(math.e), x.type)))
    rest = vector_call(b, "fma", exponent, _constant(-_LN2_HIGH, x.type), bounded)
    rest = vector_call(b, "fma", exponent, _constant(-_LN2_LOW, x.type), rest)
    return _power(b, x, exponent, rest, _EXP_TERMS, -87.0)


def exp2_of(b: Any, x: Any) -> Any:
    """2^x of every lane, to about a unit in the last place; exactly 0 below -126, 2^127 above 127; NaN stays NaN."""
    bounded = _bounded(b, x, -126.0, 127.0)
    exponent = vector_call(b, "rint", bounded)
    return _power(b, x, exponent, b.fsub(bounded, exponent), _EXP2_TERMS, -126.0)


def _bounded(b: Any, x: Any, lowest: float, highest: float) -> Any:
    """A vector's lanes, none below or above these."""
    bounded = vector_call(b, "maxnum", x, _constant(lowest, x.type))
    return vector_call(b, "minnum", bounded, _constant(highest, x.type))


def _polynomial(b: Any, rest: Any, terms: Sequence[float]) -> Any:
    """The polynomial of every lane, whose coefficients are `terms`, that of the highest power first."""
    total, *others = (_constant(term, rest.type) for term in terms)
    for term in others:
        total = vector_call(b, "fma", total, rest, term)
    return total


def _power(b: Any, x: Any, exponent: Any, rest: Any, terms: Sequence[float], lowest: float) -> Any:
    """2^exponent times the polynomial of `rest`; 0 where `x` is below `lowest`."""
    words = ir.VectorType(I32, x.type.count)
    bias, places = (ir.Constant(words, [number] * words.count) for number in (127, 23))
    bits = b.shl(b.add(b.fptosi(exponent, words), bias), places)
    scaled = b.fmul(_polynomial(b, rest, terms), b.bitcast(bits, x.type))
    is_tiny, is_number = b.fcmp_ordered("<", x, _constant(lowest, x.type)), b.fcmp_ordered("ord", x, x)
    return b.select(is_number, b.select(is_tiny, _constant(0.0, x.type), scaled), x)


def short_exp2(b: Any, x: Any) -> Any:
    """2^x of 16 lanes to 2^-18 of it, which is little beside rounding to bfloat16, by AVX-512; exactly 1 where x is 0.

    Exactly 0 below -150, subnormal below -126; NaN stays NaN.
    """
    floats, mask = x.type, ir.IntType(x.type.count)
    every, rounding = ir.Constant(mask, -1), ir.Constant(I32, 4)
    signature = ir.FunctionType(floats, [floats, I32, floats, mask, I32])
    reduce = cgutils.get_or_insert_function(b.module, signature, "llvm.x86.avx512.mask.reduce.ps.512")
    rest = b.call(reduce, [x, ir.Constant(I32, _TO_FLOOR), x, every, rounding])
    total = _polynomial(b, rest, _SHORT_EXP2_TERMS)
    signature = ir.FunctionType(floats, [floats, floats, floats, mask, I32])
    scale = cgutils.get_or_insert_function(b.module, signature, "llvm.x86.avx512.mask.scalef.ps.512")
    return b.call(scale, [total, x, total, every, rounding])  # by 2 to the power of x's floor


@intrinsic
def exp(typing_context: Any, x: Any) -> Any:
    """`exp_of` every lane."""
    return x(x), lambda context, builder, sig, args: exp_of(builder, args[0])


@intrinsic
def exp2(typing_context: Any, x: Any) -> Any:
    """`exp2_of` every lane."""
    return x(x), lambda context, builder, sig, args: exp2_of(builder, args[0])
