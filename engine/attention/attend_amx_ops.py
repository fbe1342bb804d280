"""The inner products of `attend_cpu` by AMX, for caches whose elements are pairs of bfloat16.

Up to four row tiles of queries meet the keys of a block, or the values of a span's blocks, which lie as the instruction
reads them: 16 pairs of dimensions of 16 keys, or eight pairs of keys of 16 dimensions. The instruction adds as `amx`
says, 32 dimensions or 16 keys after the other. All functions here work inside `numba.njit` only, on flat C-contiguous
arrays and element offsets; nothing is bounds-checked.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.attention.attend_ops import BLOCK_SIZE, LANES, SPAN, SPAN_BLOCKS, block_ahead, block_at, has_pairs
from quant.kernels.amx import BFLOAT16, COMPILES_AMX, add_products, clear_tile, load_tile, shape_tiles, store_tile
from quant.kernels.arrays import LINE_BYTES
from quant.kernels.bfloat16_ops import for_each_count, round_two
from quant.kernels.simd import I32, array_data, lanes_at, prefetch_at, spread

SUMS = (0, 1, 2, 3)
"""Tiles of sums, one for each row tile."""
QUERIES, KEYS, WEIGHTS, VALUES = 4, 5, 6, 7
"""The other tiles."""
STEP_DIMENSIONS = 32
"""Dimensions of queries and keys that an instruction takes."""
_BLOCK_PAIRS = BLOCK_SIZE // 2
_GROUP_WORDS = _BLOCK_PAIRS * LANES
"""Words of a block's values of 16 dimensions."""
_WORD_BYTES = 4
_WORDS = ir.VectorType(I32, LANES)


def _has_code(cache: Any) -> bool:
    """Whether there is code for such a cache: without AMX, LLVM would end the process."""
    return COMPILES_AMX and has_pairs(cache)


@intrinsic
def configure_attention(typing_context, tile_rows):  # type: ignore[no-untyped-def]
    """Let this thread's tiles have the shapes that the others of this module need, with so many rows of queries."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if COMPILES_AMX:
            whole, half = (ir.Constant(args[0].type, rows) for rows in (BLOCK_SIZE, _BLOCK_PAIRS))
            rows = [(args[0], LINE_BYTES)] * len(SUMS) + [(args[0], LINE_BYTES), (whole, LINE_BYTES)]
            shape_tiles(b, [*rows, (args[0], LINE_BYTES // 2), (half, LINE_BYTES)])
        return context.get_dummy_value()

    return types.none(types.intp), codegen


@intrinsic
def round_query(typing_context, qkv, source, scale, q, target):  # type: ignore[no-untyped-def]
    """Write 32 numbers of qkv float32 times `scale` as 16 words of two bfloat16.

    `source` counts numbers, `target` words of q, a float32 array.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:
            return context.get_dummy_value()
        qkv, q = (array_data(context, b, signature, args, i) for i in (0, 3))
        scale = spread(b, args[2], LANES)
        halves = [b.add(args[1], ir.Constant(args[1].type, start)) for start in (0, LANES)]
        low, high = (b.fmul(lanes_at(b, qkv, types.float32, at, LANES, LANES), scale) for at in halves)
        b.store(round_two(b, low, high), b.bitcast(b.gep(q, [args[4]]), _WORDS.as_pointer())).align = _WORD_BYTES
        return context.get_dummy_value()

    at = types.intp
    return types.none(qkv, at, types.float32, q, at), codegen


@intrinsic
def score_tiles(  # type: ignore[no-untyped-def]
    typing_context, q, row, count, tile_rows, head_dim, keys, first_of_head, blocks, index, last, scores, column
):
    """`count` row tiles of queries, one to four, from `row` on, times keys of block `first_of_head + blocks[index]`.

    q [rows, head_dim] bfloat16 in a float32 array; keys words, of which a block is [head_dim / 2, 16]; scores float32
    [rows, SPAN], to whose columns from `column` on those of the block are written. `last` is where the blocks end that
    will be used: a single row tile prefetches keys of `block_ahead`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not _has_code(signature.args[5]):
            return context.get_dummy_value()
        q, keys, blocks, scores = (array_data(context, b, signature, args, i) for i in (0, 5, 7, 10))
        row, count, tile_rows, head_dim, first_of_head, index, last, column = (
            args[i] for i in (1, 2, 3, 4, 6, 8, 9, 11)
        )

        def number(value: int) -> ir.Constant:
            return ir.Constant(head_dim.type, value)

        base, ahead = (
            block_at(b, blocks, first_of_head, at, _BLOCK_PAIRS, head_dim)
            for at in (index, block_ahead(b, index, last))
        )
        words = b.sdiv(head_dim, number(2))

        def make(num_tiles: int) -> None:
            rows = [b.add(row, b.mul(tile_rows, number(i))) for i in range(num_tiles)]
            for tile in SUMS[:num_tiles]:
                clear_tile(b, tile)
            with cgutils.for_range(b, b.sdiv(head_dim, number(STEP_DIMENSIONS))) as loop:
                offset = b.mul(loop.index, number(STEP_DIMENSIONS // 2 * LANES))
                load_tile(b, KEYS, b.gep(keys, [b.add(base, offset)]), number(LINE_BYTES))
                for line in range(STEP_DIMENSIONS // 2 if num_tiles == 1 else 0):
                    prefetch_at(b, keys, b.add(b.add(ahead, offset), number(line * LANES)))
                for tile, first in zip(SUMS, rows, strict=False):
                    at = b.add(b.mul(first, words), b.mul(loop.index, number(STEP_DIMENSIONS // 2)))
                    load_tile(b, QUERIES, b.gep(q, [at]), b.mul(words, number(_WORD_BYTES)))
                    add_products(b, BFLOAT16, tile, QUERIES, KEYS)
            for tile, first in zip(SUMS, rows, strict=False):
                at = b.add(b.mul(first, number(SPAN)), column)
                store_tile(b, tile, b.gep(scores, [at]), number(SPAN * _WORD_BYTES))

        for_each_count(b, count, make, len(SUMS))
        return context.get_dummy_value()

    i = types.intp
    return types.none(q, i, i, i, i, keys, i, blocks, i, i, scores, i), codegen


@intrinsic
def copy_tail(typing_context, values, first_of_head, blocks, index, num_keys, head_dim, tail):  # type: ignore[no-untyped-def]
    """The first `num_keys` keys' values of a block, and zeros for the others: tail uint32 [head_dim / 16, 8, 16]."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not _has_code(signature.args[0]):
            return context.get_dummy_value()
        values, blocks, tail = (array_data(context, b, signature, args, i) for i in (0, 2, 6))
        first_of_head, index, num_keys, head_dim = (args[i] for i in (1, 3, 4, 5))

        def number(value: int) -> ir.Constant:
            return ir.Constant(head_dim.type, value)

        base = block_at(b, blocks, first_of_head, index, _BLOCK_PAIRS, head_dim)
        with cgutils.for_range(b, b.sdiv(head_dim, number(LANES))) as loop:
            group = b.mul(loop.index, number(_GROUP_WORDS))
            for pair in range(_BLOCK_PAIRS):
                at = b.add(group, number(pair * LANES))
                line = b.load(b.bitcast(b.gep(values, [b.add(base, at)]), _WORDS.as_pointer()))
                line.align = _WORD_BYTES
                has_first, has_both = (b.icmp_signed(">", num_keys, number(2 * pair + half)) for half in (0, 1))
                one = b.select(has_first, ir.Constant(I32, 0xFFFF), ir.Constant(I32, 0))
                mask = b.select(has_both, ir.Constant(I32, -1), one)
                kept = b.and_(line, spread(b, mask, LANES))
                b.store(kept, b.bitcast(b.gep(tail, [at]), _WORDS.as_pointer())).align = _WORD_BYTES
        return context.get_dummy_value()

    i = types.intp
    return types.none(values, i, blocks, i, i, i, tail), codegen


@intrinsic
def sum_tiles(  # type: ignore[no-untyped-def]
    typing_context, scores, row, count, tile_rows, head_dim, values, first_of_head, blocks, begin, end, tail, cut, sums
):
    """Add the weighted values of blocks `begin : end` of a span to the sums of `count` row tiles, from `row` on.

    scores float32 [rows, SPAN], each row of which begins with its weights as bfloat16; values words, of which a block
    is [head_dim / 16, 8 pairs of keys, 16]; sums float32 [rows, head_dim]. If `cut` is one of those blocks, its values
    are those of `tail` (`copy_tail`).
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not _has_code(signature.args[5]):
            return context.get_dummy_value()
        scores, values, blocks, tail, sums = (array_data(context, b, signature, args, i) for i in (0, 5, 7, 10, 12))
        row, count, tile_rows, head_dim, first_of_head, begin, end, cut = (args[i] for i in (1, 2, 3, 4, 6, 8, 9, 11))

        def number(value: int) -> ir.Constant:
            return ir.Constant(head_dim.type, value)

        def make(num_tiles: int) -> None:
            rows = [b.add(row, b.mul(tile_rows, number(i))) for i in range(num_tiles)]
            with cgutils.for_range(b, b.sdiv(head_dim, number(LANES))) as groups:
                first_dimension = b.mul(groups.index, number(LANES))
                places = [b.gep(sums, [b.add(b.mul(first, head_dim), first_dimension)]) for first in rows]
                stride = b.mul(head_dim, number(_WORD_BYTES))
                for tile, place in zip(SUMS, places, strict=False):
                    load_tile(b, tile, place, stride)
                group = b.mul(groups.index, number(_GROUP_WORDS))
                with cgutils.for_range(b, b.sub(end, begin)) as loop:
                    index = b.add(begin, loop.index)
                    base = block_at(b, blocks, first_of_head, index, _BLOCK_PAIRS, head_dim)
                    whole, copied = b.gep(values, [b.add(base, group)]), b.gep(tail, [group])
                    load_tile(b, VALUES, b.select(b.icmp_signed("==", index, cut), copied, whole), number(LINE_BYTES))
                    column = b.mul(b.srem(index, number(SPAN_BLOCKS)), number(_BLOCK_PAIRS))
                    for tile, first in zip(SUMS, rows, strict=False):
                        weights = b.gep(scores, [b.add(b.mul(first, number(SPAN)), column)])
                        load_tile(b, WEIGHTS, weights, number(SPAN * _WORD_BYTES))
                        add_products(b, BFLOAT16, tile, WEIGHTS, VALUES)
                for tile, place in zip(SUMS, places, strict=False):
                    store_tile(b, tile, place, stride)

        for_each_count(b, count, make, len(SUMS))
        return context.get_dummy_value()

    i = types.intp
    return types.none(scores, i, i, i, i, values, i, blocks, i, i, tail, i, sums), codegen
