"""The inner products of `attend_cpu` by AMX, for caches whose elements are pairs of bfloat16.

One or two row tiles of queries meet the keys of one or two blocks, and one or two of weights the values of a span, 32
dimensions at a time: so tiles that are loaded are used twice. Keys lie as the instruction reads them, 16 pairs of
dimensions of 16 keys. Of values it reads 16 pairs of keys of 16 dimensions. Those are of two blocks, which lie apart,
so a span's values are copied first. The instruction adds as `amx` says, 32 dimensions or 32 keys after the other.

All functions here work inside `numba.njit` only, on flat C-contiguous arrays and element offsets; nothing is
bounds-checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.attention.attend_ops import BLOCK_SIZE, LANES, SPAN, SPAN_BLOCKS, block_ahead, block_at, has_pairs
from quant.kernels.amx import (
    BFLOAT16,
    COMPILES_AMX,
    TILE_ROWS,
    add_products,
    clear_tile,
    load_tile,
    shape_tiles,
    store_tile,
)
from quant.kernels.arrays import LINE_BYTES
from quant.kernels.bfloat16_ops import for_each_count, round_two
from quant.kernels.simd import I32, array_data, lanes_at, prefetch_at, spread

SUMS, ROWS, COLUMNS = ((0, 1), (2, 3)), (4, 6), (5, 7)
"""Tiles: sums of each row tile, one for each column tile; queries or weights; keys or values."""
MAX_TILES = len(ROWS)
"""Row tiles, and column tiles, that are multiplied together."""
STEP_DIMENSIONS = 32
"""Dimensions of queries and keys that an instruction takes."""
STEP_KEYS = 32
"""Keys of weights and values that it takes."""
_BLOCK_PAIRS = BLOCK_SIZE // 2
_GROUP_WORDS = _BLOCK_PAIRS * LANES
"""Words of a block's values of 16 dimensions."""
_SPAN_WORDS = SPAN_BLOCKS * _GROUP_WORDS
"""Words of a span's."""
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
            whole = ir.Constant(args[0].type, TILE_ROWS)
            tiles = range(max(COLUMNS) + 1)
            shape_tiles(b, [(whole if tile in COLUMNS else args[0], LINE_BYTES) for tile in tiles])
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


def _add_tiles(b: Any, rows: Sequence[Any], stride: Any, columns: Sequence[Any]) -> None:
    """Add the products of row tiles, `stride` bytes from row to row, and column tiles, at one or two pointers each."""
    for r, row in enumerate(rows):
        load_tile(b, ROWS[r], row, stride)
        for c, column in enumerate(columns):
            if r == 0:
                load_tile(b, COLUMNS[c], column, ir.Constant(stride.type, LINE_BYTES))
            add_products(b, BFLOAT16, SUMS[r][c], ROWS[r], COLUMNS[c])


@intrinsic
def score_tiles(  # type: ignore[no-untyped-def]
    typing_context,
    q,
    row,
    count,
    tile_rows,
    head_dim,
    keys,
    first_of_head,
    blocks,
    index,
    num_blocks,
    last,
    scores,
    column,
):
    """`count` row tiles of queries from `row` on times keys of `num_blocks` blocks from `index` on, one or two of both.

    q [rows, head_dim] bfloat16 in a float32 array; keys words, of which block `first_of_head + blocks[i]`,
    [head_dim / 2, 16], is the sequence's block i; scores float32 [rows, SPAN], to whose columns from `column` on those
    of the blocks are written. `last` is where the blocks end that will be used: a single row tile prefetches keys of
    `block_ahead`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not _has_code(signature.args[5]):
            return context.get_dummy_value()
        q, keys, blocks, scores = (array_data(context, b, signature, args, i) for i in (0, 5, 7, 11))
        row, count, tile_rows, head_dim, first_of_head, index, num_blocks, last, column = (
            args[i] for i in (1, 2, 3, 4, 6, 8, 9, 10, 12)
        )

        def number(value: int) -> ir.Constant:
            return ir.Constant(head_dim.type, value)

        words = b.sdiv(head_dim, number(2))

        def make(num_tiles: int, num_blocks: int) -> None:
            rows = [b.add(row, b.mul(tile_rows, number(i))) for i in range(num_tiles)]
            indices = [b.add(index, number(i)) for i in range(num_blocks)]
            bases, aheads = (
                [block_at(b, blocks, first_of_head, at, _BLOCK_PAIRS, head_dim) for at in places]
                for places in (indices, [block_ahead(b, at, last) for at in indices])
            )
            sums = {(r, c): SUMS[r][c] for r in range(num_tiles) for c in range(num_blocks)}
            for tile in sums.values():
                clear_tile(b, tile)
            with cgutils.for_range(b, b.sdiv(head_dim, number(STEP_DIMENSIONS))) as loop:
                offset = b.mul(loop.index, number(STEP_DIMENSIONS // 2 * LANES))
                for ahead in aheads if num_tiles == 1 else []:
                    for line in range(STEP_DIMENSIONS // 2):
                        prefetch_at(b, keys, b.add(b.add(ahead, offset), number(line * LANES)))
                step = b.mul(loop.index, number(STEP_DIMENSIONS // 2))
                queries = [b.gep(q, [b.add(b.mul(first, words), step)]) for first in rows]
                columns = [b.gep(keys, [b.add(base, offset)]) for base in bases]
                _add_tiles(b, queries, b.mul(words, number(_WORD_BYTES)), columns)
            for (r, c), tile in sums.items():
                at = b.add(b.add(b.mul(rows[r], number(SPAN)), column), number(c * BLOCK_SIZE))
                store_tile(b, tile, b.gep(scores, [at]), number(SPAN * _WORD_BYTES))

        def make_rows(num_tiles: int) -> None:
            for_each_count(b, num_blocks, lambda blocks: make(num_tiles, blocks), MAX_TILES)

        for_each_count(b, count, make_rows, MAX_TILES)
        return context.get_dummy_value()

    i = types.intp
    return types.none(q, i, i, i, i, keys, i, blocks, i, i, i, scores, i), codegen


@intrinsic
def copy_values(typing_context, values, first_of_head, blocks, begin, end, num_keys, head_dim, copied):  # type: ignore[no-untyped-def]
    """The values of a span's blocks `begin : end`, and zeros for the others: copied uint32 [head_dim / 16, 32, 16].

    The sequence has `num_keys` keys; what lies behind them counts as zeros, too.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not _has_code(signature.args[0]):
            return context.get_dummy_value()
        values, blocks, copied = (array_data(context, b, signature, args, i) for i in (0, 2, 7))
        first_of_head, begin, end, num_keys, head_dim = (args[i] for i in (1, 3, 4, 5, 6))

        def number(value: int) -> ir.Constant:
            return ir.Constant(head_dim.type, value)

        first_of_span = b.mul(b.sdiv(begin, number(SPAN_BLOCKS)), number(SPAN_BLOCKS))
        with cgutils.for_range(b, number(SPAN_BLOCKS)) as span:
            index = b.add(first_of_span, span.index)
            is_used = b.and_(b.icmp_signed(">=", index, begin), b.icmp_signed("<", index, end))
            keys_left = b.select(is_used, b.sub(num_keys, b.mul(index, number(BLOCK_SIZE))), number(0))
            readable = b.select(is_used, index, begin)
            base = block_at(b, blocks, first_of_head, readable, _BLOCK_PAIRS, head_dim)
            masks = []
            for pair in range(_BLOCK_PAIRS):
                has_first, has_both = (b.icmp_signed(">", keys_left, number(2 * pair + half)) for half in (0, 1))
                one = b.select(has_first, ir.Constant(I32, 0xFFFF), ir.Constant(I32, 0))
                masks.append(spread(b, b.select(has_both, ir.Constant(I32, -1), one), LANES))
            with cgutils.for_range(b, b.sdiv(head_dim, number(LANES))) as groups:
                source = b.add(base, b.mul(groups.index, number(_GROUP_WORDS)))
                target = b.mul(b.add(b.mul(groups.index, number(SPAN_BLOCKS)), span.index), number(_GROUP_WORDS))
                for pair, mask in enumerate(masks):
                    offset = number(pair * LANES)
                    line = b.load(b.bitcast(b.gep(values, [b.add(source, offset)]), _WORDS.as_pointer()))
                    line.align = _WORD_BYTES
                    place = b.bitcast(b.gep(copied, [b.add(target, offset)]), _WORDS.as_pointer())
                    b.store(b.and_(line, mask), place).align = LINE_BYTES
        return context.get_dummy_value()

    i = types.intp
    return types.none(values, i, blocks, i, i, i, i, copied), codegen


@intrinsic
def sum_tiles(typing_context, scores, row, count, tile_rows, head_dim, values, sums):  # type: ignore[no-untyped-def]
    """Add the weighted values of a span to the sums of `count` row tiles, one or two, from `row` on.

    scores float32 [rows, SPAN], each row of which begins with its weights as bfloat16; values are those of
    `copy_values`; sums float32 [rows, head_dim].
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:
            return context.get_dummy_value()
        scores, values, sums = (array_data(context, b, signature, args, i) for i in (0, 5, 6))
        row, count, tile_rows, head_dim = args[1:5]

        def number(value: int) -> ir.Constant:
            return ir.Constant(head_dim.type, value)

        stride = b.mul(head_dim, number(_WORD_BYTES))

        def make(num_tiles: int) -> None:
            rows = [b.add(row, b.mul(tile_rows, number(i))) for i in range(num_tiles)]
            with cgutils.for_range(b, b.sdiv(head_dim, number(MAX_TILES * LANES))) as loop:
                groups = [b.add(b.mul(loop.index, number(MAX_TILES)), number(c)) for c in range(MAX_TILES)]
                places = {}
                for r, first in enumerate(rows):
                    for c, group in enumerate(groups):
                        at = b.add(b.mul(first, head_dim), b.mul(group, number(LANES)))
                        places[SUMS[r][c]] = b.gep(sums, [at])
                for tile, place in places.items():
                    load_tile(b, tile, place, stride)
                for step in range(SPAN // STEP_KEYS):
                    column = number(step * STEP_KEYS // 2)
                    weights = [b.gep(scores, [b.add(b.mul(first, number(SPAN)), column)]) for first in rows]
                    offset = number(step * TILE_ROWS * LANES)
                    columns = [b.gep(values, [b.add(b.mul(group, number(_SPAN_WORDS)), offset)]) for group in groups]
                    _add_tiles(b, weights, number(SPAN * _WORD_BYTES), columns)
                for tile, place in places.items():
                    store_tile(b, tile, place, stride)

        for_each_count(b, count, make, MAX_TILES)
        return context.get_dummy_value()

    i = types.intp
    return types.none(scores, i, i, i, i, values, sums), codegen
