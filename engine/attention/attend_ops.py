"""The inner products of `attend_cpu`, some rows of queries at a time, as register tiles of LLVM's own operations.

A tile's sums fill registers: rows times blocks of keys for scores, rows times 16 dimensions each for values. All tiles
add in the same order, whatever their shape. They work inside `numba.njit` only, on flat C-contiguous arrays and element
offsets; nothing is bounds-checked.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.simd import F32, array_data, lanes_at, spread, vector_call

LANES = 16
"""Keys of a vector of scores, dimensions of a vector of sums."""
BLOCK_SIZE = LANES
"""Tokens of a block."""
SPAN_BLOCKS = 4
SPAN = SPAN_BLOCKS * BLOCK_SIZE
"""Keys that go into a row's softmax together."""
_FLOATS = ir.VectorType(F32, LANES)


def _add_products(b: Any, numbers: list[Any], lines: list[Any], sums: list[list[Any]]) -> None:
    """Add each row's number, of which there is the place, times each line to the row's sum for that line."""
    for place, row_sums in zip(numbers, sums, strict=True):
        number = spread(b, b.load(place), LANES)
        for line, total in zip(lines, row_sums, strict=True):
            b.store(vector_call(b, "fma", number, line, b.load(total)), total)


def make_scores(rows: int, blocks: int) -> Any:
    """`rows` rows of queries times the keys of one or two blocks, as a Numba intrinsic.

    q float32 flat [head_dim, num_rows], of which the first row begins at `place`; keys flat, float32 or bfloat16 as
    uint16, in which blocks [head_dim, 16] begin at `first` and `second` (not read with one block); scores float32 flat
    [num_rows, SPAN], to whose place `target` the first row's are written, those of the second block after those of the
    first. Every score is added dimension by dimension.
    """

    @intrinsic
    def score(typing_context, q, place, num_rows, head_dim, keys, first, second, scores, target):  # type: ignore[no-untyped-def]
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            q_data, key_data, score_data = (array_data(context, b, signature, args, i) for i in (0, 4, 7))
            place, num_rows, head_dim, target = (args[i] for i in (1, 2, 3, 8))
            bases = args[5 : 5 + blocks]

            def number(value: int) -> ir.Constant:
                return ir.Constant(head_dim.type, value)

            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            sums = [[cgutils.alloca_once_value(b, zero) for _ in range(blocks)] for _ in range(rows)]
            with cgutils.for_range(b, head_dim) as loop:
                d = b.mul(loop.index, number(LANES))
                lines = [lanes_at(b, key_data, signature.args[4].dtype, b.add(base, d), LANES, LANES) for base in bases]
                row_at = b.add(place, b.mul(loop.index, num_rows))
                _add_products(b, [b.gep(q_data, [b.add(row_at, number(r))]) for r in range(rows)], lines, sums)
            for r, row_sums in enumerate(sums):
                for block, total in enumerate(row_sums):
                    at = b.gep(score_data, [b.add(target, number(r * SPAN + block * LANES))])
                    b.store(b.load(total), b.bitcast(at, _FLOATS.as_pointer())).align = 4
            return context.get_dummy_value()

        at = types.intp
        return types.none(q, at, at, at, keys, at, at, scores, at), codegen

    return score


def make_sums(rows: int, groups: int) -> Any:
    """Add the weighted values of a block's first keys to the sums of `rows` rows, as a Numba intrinsic.

    scores float32 flat [num_rows, SPAN], of which the first row's weights begin at `place`; values flat, float32 or
    bfloat16 as uint16, in which [groups, 16 keys, 16 dimensions] begin at `base`; sums float32 flat [num_rows,
    head_dim], in which those dimensions of the first row begin at `target`. Keys are added in order.
    """

    @intrinsic
    def add(typing_context, scores, place, num_keys, head_dim, values, base, sums, target):  # type: ignore[no-untyped-def]
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            score_data, value_data, sum_data = (array_data(context, b, signature, args, i) for i in (0, 4, 6))
            place, num_keys, head_dim, base, target = (args[i] for i in (1, 2, 3, 5, 7))

            def number(value: int) -> ir.Constant:
                return ir.Constant(head_dim.type, value)

            def sum_at(r: int, group: int) -> Any:
                at = b.add(b.add(target, b.mul(number(r), head_dim)), number(group * LANES))
                return b.bitcast(b.gep(sum_data, [at]), _FLOATS.as_pointer())

            totals = []
            for r in range(rows):
                loaded = [b.load(sum_at(r, group)) for group in range(groups)]
                for value in loaded:
                    value.align = 4
                totals.append([cgutils.alloca_once_value(b, value) for value in loaded])
            with cgutils.for_range(b, num_keys) as loop:
                first = b.add(base, b.mul(loop.index, number(LANES)))
                places = [b.add(first, number(group * LANES * BLOCK_SIZE)) for group in range(groups)]
                dtype = signature.args[4].dtype
                lines = [lanes_at(b, value_data, dtype, at, LANES, LANES) for at in places]
                weight_at = b.add(place, loop.index)
                weights = [b.gep(score_data, [b.add(weight_at, number(r * SPAN))]) for r in range(rows)]
                _add_products(b, weights, lines, totals)
            for r, row_totals in enumerate(totals):
                for group, total in enumerate(row_totals):
                    b.store(b.load(total), sum_at(r, group)).align = 4
            return context.get_dummy_value()

        at = types.intp
        return types.none(scores, at, at, at, values, at, sums, at), codegen

    return add
