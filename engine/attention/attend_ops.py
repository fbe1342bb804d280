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

from quant.kernels.bfloat16_ops import add_pair, round_two
from quant.kernels.powers import exp2_of, short_exp2
from quant.kernels.simd import (
    F32,
    I32,
    array_data,
    bfloat16_bits,
    lanes_at,
    prefetch_at,
    spread,
    vector_call,
)

LANES = 16
"""Keys of a vector of scores, dimensions of a vector of sums."""
BLOCK_SIZE = LANES
"""Tokens of a block."""
SPAN_BLOCKS = 4
SPAN = SPAN_BLOCKS * BLOCK_SIZE
"""Keys that go into a row's softmax together."""
MAX_FETCHING_ROWS = 8
"""Up to so many rows in a tile keys and values come from memory more slowly than they are multiplied."""
_FLOATS, _WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


def has_pairs(array: Any) -> bool:
    """Whether an element of an array of this type is a pair of bfloat16."""
    return bool(array.dtype == types.uint32)


@intrinsic
def numbers_together(typing_context, cache):  # type: ignore[no-untyped-def]
    """How many numbers lie together in an element of a cache's array: two where it is a pair of bfloat16, a word."""
    count = 2 if has_pairs(cache) else 1
    return types.intp(cache), lambda context, b, signature, args: context.get_constant(types.intp, count)


@intrinsic
def write_numbers(typing_context, x, source, cache, target, stride, together):  # type: ignore[no-untyped-def]
    """Write 16 numbers of x float32, from `source` on, to a cache float32 or bfloat16 as uint16, from `target` on.

    `together` of them, one or two, lie side by side; the next ones lie `together * stride` places after those.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, stride, together = args[1], args[4], args[5]

        def number(value: int) -> ir.Constant:
            return ir.Constant(stride.type, value)

        target = b.gep(array_data(context, b, signature, args, 2), [args[3]])
        values = lanes_at(b, array_data(context, b, signature, args, 0), types.float32, source, LANES, LANES)
        if signature.args[2].dtype == types.uint16:
            values = bfloat16_bits(b, values)
        is_paired = b.icmp_signed("==", together, number(2))
        for lane in range(LANES):
            paired = b.add(b.mul(number(lane - lane % 2), stride), number(lane % 2))
            offset = b.select(is_paired, paired, b.mul(number(lane), stride))
            b.store(b.extract_element(values, ir.Constant(I32, lane)), b.gep(target, [offset]))
        return context.get_dummy_value()

    at = types.intp
    return types.none(x, at, cache, at, at, at), codegen


def _rotate_places(b: Any, vectors: list[Any]) -> list[Any]:
    """Move the numbers of 8 or 16 vectors of 16 lanes: a number's vector and lane, as one number in bits, rotate by 4.

    So 16 vectors are transposed. Each step, which rotates by one bit, interleaves two vectors.
    """
    lanes = ir.VectorType(I32, LANES)
    orders = [ir.Constant(lanes, [start + i // 2 + i % 2 * LANES for i in range(LANES)]) for start in (0, LANES // 2)]
    half = len(vectors) // 2
    for _ in range(4):
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [b.shuffle_vector(*pair, order) for pair in pairs for order in orders]
    return vectors


@intrinsic
def write_columns(typing_context, x, places, scale, cache, q, target, stride, d):  # type: ignore[no-untyped-def]
    """Write 16 dimensions, from `d` on, of 16 rows of x float32, times `scale`, as columns of q, for such a cache.

    Row r begins at `places[r]`; q flat [head_dim, stride], or words [head_dim / 2, stride] with pairs as bfloat16, and
    `target` is the first row's place in it. Always 16 places of a column are written, even where fewer rows are left.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x_data, place_data, q_data = (array_data(context, b, signature, args, i) for i in (0, 1, 4))
        scales, (target, stride, d) = spread(b, args[2], LANES), args[5:]

        def number(value: int) -> ir.Constant:
            return ir.Constant(d.type, value)

        rows = []
        for r in range(LANES):
            at = b.add(b.load(b.gep(place_data, [number(r)])), d)
            rows.append(b.fmul(lanes_at(b, x_data, types.float32, at, LANES, LANES), scales))
        first = d
        if has_pairs(signature.args[3]):
            rows = [round_two(b, rows[r], rows[r + 1]) for r in range(0, LANES, 2)]
            first = b.sdiv(d, number(2))
        for i, column in enumerate(_rotate_places(b, rows)):
            at = b.gep(q_data, [b.add(target, b.mul(b.add(first, number(i)), stride))])
            b.store(column, b.bitcast(at, column.type.as_pointer())).align = 4
        return context.get_dummy_value()

    at = types.intp
    return types.none(x, places, types.float32, cache, q, at, at, at), codegen


@intrinsic
def weights_of(typing_context, cache, differences):  # type: ignore[no-untyped-def]
    """2 to the power of 16 differences of scores, as exactly as weights are used with such a cache."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return short_exp2(b, args[1]) if has_pairs(signature.args[0]) else exp2_of(b, args[1])

    return differences(cache, differences), codegen


@intrinsic
def store_weights(typing_context, cache, scores, row, column, low, high):  # type: ignore[no-untyped-def]
    """Write a row's weights of 32 keys of the span, those from `column` on in `low`, as `make_sums` reads them."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        data, at_type = array_data(context, b, signature, args, 1), signature.args[2]
        place = b.mul(args[2], context.get_constant(at_type, SPAN))
        column, low, high = args[3:]

        def write(value: Any, offset: Any) -> None:
            at = b.bitcast(b.gep(data, [b.add(place, offset)]), value.type.as_pointer())
            b.store(value, at).align = 4

        if has_pairs(signature.args[0]):
            write(round_two(b, low, high), b.sdiv(column, context.get_constant(at_type, 2)))
        else:
            write(low, column)
            write(high, b.add(column, context.get_constant(at_type, LANES)))
        return context.get_dummy_value()

    return types.none(cache, scores, types.intp, types.intp, low, high), codegen


@intrinsic
def is_any_above(typing_context, value, bound):  # type: ignore[no-untyped-def]
    """Whether any lane is above a float32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        lanes = b.fcmp_ordered(">", args[0], spread(b, args[1], args[0].type.count))
        bits = ir.IntType(args[0].type.count)
        return b.icmp_unsigned("!=", b.bitcast(lanes, bits), ir.Constant(bits, 0))

    return types.boolean(value, types.float32), codegen


def _number_at(b: Any, data: Any, offset: Any, *, is_paired: bool) -> Any:
    """A float32 of a typed pointer, or the word in its place, in every lane."""
    typed = b.bitcast(data, I32.as_pointer()) if is_paired else data
    return spread(b, b.load(b.gep(typed, [offset])), LANES)


def _line_at(b: Any, data: Any, array: Any, offset: Any) -> Any:
    """Elements of a cache from `offset` on, one for each lane: as float32, or as they are if they are words."""
    if not has_pairs(array):
        return lanes_at(b, data, array.dtype, offset, LANES, LANES)
    line = b.load(b.bitcast(b.gep(data, [offset]), _WORDS.as_pointer()))
    line.align = 4
    return line


def _add_products(b: Any, number: Any, lines: list[Any], totals: list[Any]) -> None:
    """Add a row's number, or pair, times each line to the row's sum for that line."""
    for line, total in zip(lines, totals, strict=True):
        if number.type == _FLOATS:
            b.store(vector_call(b, "fma", number, line, b.load(total)), total)
        else:
            b.store(add_pair(b, number, line, b.load(total)), total)


def block_at(b: Any, block_data: Any, first_of_head: Any, index: Any, size: int, head_dim: Any) -> Any:
    """Where block `first_of_head + blocks[index]` begins if each has `size` elements for a dimension."""
    block = b.sext(b.load(b.gep(block_data, [index])), head_dim.type)
    return b.mul(b.add(first_of_head, block), b.mul(head_dim, ir.Constant(head_dim.type, size)))


def block_ahead(b: Any, index: Any, last: Any) -> Any:
    """The block whose lines are asked for while block `index` is used: the one a span later, or the one before `last`.

    With few rows a processor can't look so far ahead by itself, and its prefetcher starts anew on every page.
    """
    ahead, final = b.add(index, ir.Constant(index.type, SPAN_BLOCKS)), b.sub(last, ir.Constant(index.type, 1))
    return b.select(b.icmp_signed("<", ahead, final), ahead, final)


def make_scores(rows: int, num_blocks: int) -> Any:
    """`rows` rows of queries times the keys of one or two blocks, as a Numba intrinsic.

    q float32 flat [head_dim, num_rows], in which the first row begins at `place`; keys flat, float32 or bfloat16 as
    uint16, in which block `first_of_head + blocks[index]` holds [head_dim, 16], and so the next one; scores float32
    flat [num_rows, SPAN], to whose place `target` the first row's are written, those of the second block after those of
    the first. Every score is added dimension by dimension. `last` is where the blocks end that will be used.

    Where keys are words a block is [head_dim / 2, 16], and q begins with words [head_dim / 2, num_rows].
    """

    @intrinsic
    def score(  # type: ignore[no-untyped-def]
        typing_context, q, place, num_rows, head_dim, keys, first_of_head, blocks, index, last, scores, target
    ):
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            q_data, key_data, block_data, score_data = (
                array_data(context, b, signature, args, i) for i in (0, 4, 6, 9)
            )
            place, num_rows, head_dim, first_of_head, index, last, target = (args[i] for i in (1, 2, 3, 5, 7, 8, 10))
            array = signature.args[4]
            is_paired = has_pairs(array)

            def number(value: int) -> ir.Constant:
                return ir.Constant(head_dim.type, value)

            def base_of(index: Any) -> Any:
                size = BLOCK_SIZE // 2 if is_paired else BLOCK_SIZE
                return block_at(b, block_data, first_of_head, index, size, head_dim)

            indices = [b.add(index, number(i)) for i in range(num_blocks)]
            bases = [base_of(index) for index in indices]
            fetched = [base_of(block_ahead(b, index, last)) for index in indices] if rows <= MAX_FETCHING_ROWS else []
            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            sums = [[cgutils.alloca_once_value(b, zero) for _ in bases] for _ in range(rows)]
            with cgutils.for_range(b, b.sdiv(head_dim, number(2)) if is_paired else head_dim) as loop:
                d = b.mul(loop.index, number(LANES))
                for base in fetched:
                    prefetch_at(b, key_data, b.add(base, d))
                lines = [_line_at(b, key_data, array, b.add(base, d)) for base in bases]
                row_at = b.add(place, b.mul(loop.index, num_rows))
                for r, row_sums in enumerate(sums):
                    at = b.add(row_at, number(r))
                    _add_products(b, _number_at(b, q_data, at, is_paired=is_paired), lines, row_sums)
            for r, row_sums in enumerate(sums):
                for block, total in enumerate(row_sums):
                    at = b.gep(score_data, [b.add(target, number(r * SPAN + block * LANES))])
                    b.store(b.load(total), b.bitcast(at, _FLOATS.as_pointer())).align = 4
            return context.get_dummy_value()

        at = types.intp
        return types.none(q, at, at, at, keys, at, blocks, at, at, scores, at), codegen

    return score


def make_sums(rows: int, groups: int) -> Any:
    """Add the weighted values of some blocks of a span to the sums of `rows` rows, as a Numba intrinsic.

    scores float32 flat [num_rows, SPAN], in which the first row's weights for those blocks begin at `place`; values
    flat, float32 or bfloat16 as uint16, in which block `first_of_head + blocks[index]`, for every index from `begin`
    to `end`, holds [head_dim / 16, 16 keys, 16 dimensions]; sums float32 flat [num_rows, head_dim], in which the first
    row's dimensions from `d` on, 16 times `groups`, begin at `target`. Of all blocks from 0 on only the first
    `num_keys` keys are read. Keys are added in order. `last` is where the blocks end that will be used.

    Where values are words a block is [head_dim / 16, 8 pairs of keys, 16 dimensions], and each row of scores begins
    with its pairs. What lies in the place of the second of a pair, of which only the first is read, has no effect.
    """

    @intrinsic
    def add(  # type: ignore[no-untyped-def]
        typing_context,
        scores,
        place,
        num_keys,
        head_dim,
        values,
        first_of_head,
        blocks,
        begin,
        end,
        last,
        d,
        sums,
        target,
    ):
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            score_data, value_data, block_data, sum_data = (
                array_data(context, b, signature, args, i) for i in (0, 4, 6, 11)
            )
            place, num_keys, head_dim, first_of_head = (args[i] for i in (1, 2, 3, 5))
            begin, end, last, d, target = (args[i] for i in (7, 8, 9, 10, 12))
            array = signature.args[4]
            is_paired = has_pairs(array)
            num_together = 2 if is_paired else 1
            lines_each = BLOCK_SIZE // num_together  # of a group

            def number(value: int) -> ir.Constant:
                return ir.Constant(head_dim.type, value)

            def sum_at(r: int, group: int) -> Any:
                at = b.add(b.add(target, b.mul(number(r), head_dim)), number(group * LANES))
                return b.bitcast(b.gep(sum_data, [at]), _FLOATS.as_pointer())

            def base_of(index: Any) -> Any:
                base = block_at(b, block_data, first_of_head, index, lines_each, head_dim)
                return b.add(base, b.mul(d, number(lines_each)))

            def places(base: Any, line: Any) -> list[Any]:
                """Where a line of every group is."""
                at = b.add(base, b.mul(line, number(LANES)))
                return [b.add(at, number(group * LANES * lines_each)) for group in range(groups)]

            def add_line(base: Any, weights: Any, line: Any, mask: Any = None) -> None:
                lines = [_line_at(b, value_data, array, at) for at in places(base, line)]
                if mask is not None:
                    lines = [b.and_(numbers, mask) for numbers in lines]
                for r, row_totals in enumerate(totals):
                    at = b.add(b.add(weights, line), number(r * SPAN))
                    _add_products(b, _number_at(b, score_data, at, is_paired=is_paired), lines, row_totals)

            totals = []
            for r in range(rows):
                loaded = [b.load(sum_at(r, group)) for group in range(groups)]
                for value in loaded:
                    value.align = 4
                totals.append([cgutils.alloca_once_value(b, value) for value in loaded])
            with cgutils.for_range(b, b.sub(end, begin)) as outer:
                index = b.add(begin, outer.index)
                base, weights = base_of(index), b.add(place, b.mul(outer.index, number(lines_each)))
                fetched = base_of(block_ahead(b, index, last)) if rows <= MAX_FETCHING_ROWS else None
                left = b.sub(num_keys, b.mul(index, number(BLOCK_SIZE)))
                count = b.select(b.icmp_signed("<", left, number(BLOCK_SIZE)), left, number(BLOCK_SIZE))
                num_lines = b.sdiv(count, number(num_together))
                with cgutils.for_range(b, num_lines) as loop:
                    for at in [] if fetched is None else places(fetched, loop.index):
                        prefetch_at(b, value_data, at)
                    add_line(base, weights, loop.index)
                if is_paired:
                    with b.if_then(b.trunc(count, ir.IntType(1))):
                        add_line(base, weights, num_lines, ir.Constant(_WORDS, [0xFFFF] * LANES))
            for r, row_totals in enumerate(totals):
                for group, total in enumerate(row_totals):
                    b.store(b.load(total), sum_at(r, group)).align = 4
            return context.get_dummy_value()

        at = types.intp
        return types.none(scores, at, at, at, values, at, blocks, at, at, at, at, sums, at), codegen

    return add
