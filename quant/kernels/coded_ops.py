"""Inner products with bfloat16 weights whose upper bytes are replaced by codes of four bits.

The upper byte of a bfloat16 is its sign and most of its exponent. A trained matrix has few different ones, so that 12
bits hold a whole weight, and a step that waits for its memory waits for 0.75 of the bytes. A table of 16 upper bytes
gives them back, and the products are those of `bfloat16_ops`. Pairs of inputs in which an upper byte has no code are
kept as they are, and are marked.

All functions here work inside `numba.njit` only, on flat C-contiguous arrays and element offsets; nothing is
bounds-checked.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.bfloat16_ops import (
    HAS_PAIRS,
    INPUTS,
    PAIR_WEIGHTS,
    UNITS,
    WORDS,
    WORK,
    Block,
    Work,
    for_each_count,
    prefetch_share,
    raw_words,
    vector_at,
)
from quant.kernels.simd import I32, array_data, enabled_features

CODE_BITS = 4
NUM_CODES = 1 << CODE_BITS
CODE_BYTES = PAIR_WEIGHTS * CODE_BITS // 8
PAIR_BYTES = PAIR_WEIGHTS + CODE_BYTES
"""Lower bytes, which fill a vector, then codes. Every other such vector goes across two cache lines; with none that
did, and more arithmetic for it, products took as long."""
TABLE_BYTES = 1 << 6
"""A table repeats itself: the instruction takes six bits for a place in it, two of which are another code's."""
HAS_TABLES = HAS_PAIRS and "avx512vbmi" in enabled_features()
"""Whether one instruction looks up 64 bytes, and products are so quick that they wait for the memory."""

BYTE_ORDER = tuple(
    tuple(lane * 16 + unit * 8 + i for lane in range(PAIR_WEIGHTS // 16) for i in range(8)) for unit in range(UNITS)
)
"""Where each unit's weights are among a pair's bytes: of each 16 the first eight or the last, which one instruction
puts together with their upper bytes."""

_BYTES = ir.VectorType(ir.IntType(8), PAIR_WEIGHTS)


def _bytes_at(b: Any, data: Any, offset: Any, count: int) -> Any:
    return vector_at(b, b.gep(data, [offset]), ir.VectorType(ir.IntType(8), count))


def _coded_words(b: Any, coded: Any, table: Any, pair: Any) -> list[Any]:
    """A pair's weights as words, one vector for each unit."""

    def number(value: int) -> ir.Constant:
        return ir.Constant(pair.type, value)

    def order(places: list[int]) -> ir.Constant:
        return ir.Constant(ir.VectorType(I32, len(places)), places)

    start = b.mul(pair, number(PAIR_BYTES))
    low = _bytes_at(b, coded, start, PAIR_WEIGHTS)
    codes = _bytes_at(b, coded, b.add(start, number(PAIR_WEIGHTS)), CODE_BYTES)
    twice = b.shuffle_vector(codes, codes, order([*range(CODE_BYTES)] * 2))
    lanes = ir.VectorType(ir.IntType(16), PAIR_WEIGHTS // 2)
    shifts = ir.Constant(lanes, [0] * (CODE_BYTES // 2) + [CODE_BITS] * (CODE_BYTES // 2))
    index = b.bitcast(b.lshr(b.bitcast(twice, lanes), shifts), _BYTES)
    signature = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
    look_up = cgutils.get_or_insert_function(b.module, signature, "llvm.x86.avx512.permvar.qi.512")
    high = b.call(look_up, [table, index])
    orders = [[byte for at in places for byte in (at, PAIR_WEIGHTS + at)] for places in BYTE_ORDER]
    return [b.bitcast(b.shuffle_vector(low, high, order(places)), WORDS) for places in orders]


class PairReader:
    """The code that reads one coded pair after the other, from pointers to the arrays of `coded_weights.CodedWeights`.

    `tile` is the tile of outputs that they are in, `mark` the first mark that is not before them.
    """

    def __init__(self, b: Any, coded: Any, tables: Any, raw: Any, marks: Any, tile: Any, mark: Any) -> None:
        self._builder, self._coded, self._raw, self._marks = b, coded, raw, marks
        self._table = _bytes_at(b, tables, b.mul(tile, ir.Constant(tile.type, TABLE_BYTES)), TABLE_BYTES)
        self._kept = [cgutils.alloca_once(b, WORDS) for _ in range(UNITS)]
        self._next_mark = cgutils.alloca_once_value(b, mark)
        self._marked = cgutils.alloca_once_value(b, b.load(b.gep(marks, [mark])))

    def read(self, pair: Any) -> list[Any]:
        """The weights of pair `pair` of the matrix as words, one vector for each unit."""
        b = self._builder

        def keep(words: list[Any]) -> None:
            for vector, where in zip(words, self._kept, strict=True):
                b.store(vector, where)

        is_marked = b.icmp_signed("==", b.trunc(pair, I32), b.load(self._marked))
        with b.if_else(is_marked, likely=False) as (as_it_is, from_codes):
            with as_it_is:
                this_mark = b.load(self._next_mark)
                keep(raw_words(b, self._raw, b.mul(this_mark, ir.Constant(pair.type, PAIR_WEIGHTS))))
                following = b.add(this_mark, ir.Constant(pair.type, 1))
                b.store(following, self._next_mark)
                b.store(b.load(b.gep(self._marks, [following])), self._marked)
            with from_codes:
                keep(_coded_words(b, self._coded, self._table, pair))
        return [b.load(where) for where in self._kept]


@intrinsic
def multiply_coded_block(  # type: ignore[no-untyped-def]
    typing_context, x, coded, tables, raw, marks, bias, out, waiting, rows, work, mark, part, parts
):
    """`bfloat16_ops.multiply_block` with coded weights.

    The arrays are those of `coded_weights.CodedWeights`; `mark` is the first mark that is not before the stretch. Every
    block of rows looks codes up: to write weights down for the blocks that follow took more time. Without `HAS_TABLES`
    nothing is coded, and there is no such code.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not HAS_TABLES:  # LLVM would end the process
            return context.get_dummy_value()
        x, coded, tables, raw, marks, bias, out, waiting = (
            array_data(context, b, signature, args, i) for i in range(8)
        )
        count, numbers, mark, part, parts = args[8:]
        work = Work(*cgutils.unpack_tuple(b, numbers))

        def make(rows: int) -> None:
            block = Block(b, x, bias, out, waiting, work, rows, is_paired=True)
            block.begin()
            reader = PairReader(b, coded, tables, raw, marks, work.tile, mark)
            first_pair = b.sdiv(b.add(b.mul(work.tile, work.k_size), work.first), block.number(INPUTS))
            ahead = block.next_weights(part, parts, PAIR_BYTES)
            with block.loop() as loop:
                prefetch_share(b, coded, ahead, loop.index)
                pair = b.add(first_pair, loop.index)
                block.add(loop.index, reader.read(pair))
            block.end()

        for_each_count(b, count, make)
        return context.get_dummy_value()

    at = types.intp
    return types.none(x, coded, tables, raw, marks, bias, out, waiting, at, WORK, at, at, at), codegen
