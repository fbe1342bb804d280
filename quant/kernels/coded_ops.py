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

from quant.kernels.arrays import LINE_BYTES
from quant.kernels.bfloat16_ops import (
    HAS_PAIRS,
    INPUTS,
    PAIR_WEIGHTS,
    UNITS,
    WEIGHT_BYTES,
    WORDS,
    WORK,
    Block,
    Work,
    for_each_count,
    prefetch_share,
    raw_words,
    vector_at,
)
from quant.kernels.simd import I32, array_data, enabled_features, prefetch_at

CODE_BITS = 4
NUM_CODES = 1 << CODE_BITS
CODE_BYTES = PAIR_WEIGHTS * CODE_BITS // 8
PAIR_BYTES = PAIR_WEIGHTS + CODE_BYTES
"""Lower bytes, which fill a vector, then codes. Every other such vector goes across two cache lines; with none that
did, and more arithmetic for it, products took as long."""
STEP_PAIRS = LINE_BYTES // (INPUTS * WEIGHT_BYTES)
"""Pairs that `StepWriter` looks up together: those of an instruction of AMX."""
FETCHED_BYTES = 4096
"""How far ahead it asks for coded weights, into the L1 cache: two and a half steps."""
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


class StepWriter:
    """The code that writes `STEP_PAIRS` neighbouring pairs of a tile down as weights, step after step.

    The arguments are those of `PairReader`. A step is looked up as if none of its pairs were marked, without a branch
    in between, and those that are get their weights after that. It is a function of its own: so much code exists once.
    """

    def __init__(self, b: Any, coded: Any, tables: Any, raw: Any, marks: Any, tile: Any, mark: Any) -> None:
        self._builder, self._coded, self._raw, self._marks = b, coded, raw, marks
        self._table = b.gep(tables, [b.mul(tile, ir.Constant(tile.type, TABLE_BYTES))])
        self._next_mark = cgutils.alloca_once_value(b, mark)

    def write(self, pair: Any, target: Any, ahead: Any, share: Any) -> None:
        """Write the pairs from `pair` of the matrix on, [pairs, OUTPUTS, 2], to a pointer to 16-bit integers.

        Meanwhile `LINES` lines for each pair are asked for, from byte `ahead` on and `share` apart.
        """
        b = self._builder

        def number(value: int) -> ir.Constant:
            return ir.Constant(pair.type, value)

        byte = ir.IntType(8).as_pointer()
        start = b.gep(self._coded, [b.mul(pair, number(PAIR_BYTES))])
        places = [b.bitcast(place, byte) for place in (start, self._table, target, b.gep(self._coded, [ahead]))]
        b.call(_step_function(b.module), [*places, share])
        check, copy, end = (b.append_basic_block(name) for name in ("check_mark", "copy_marked", "no_mark"))
        b.branch(check)
        b.position_at_end(check)
        mark = b.load(self._next_mark)
        place = b.sub(b.sext(b.load(b.gep(self._marks, [mark])), pair.type), pair)
        b.cbranch(b.icmp_signed("<", place, number(STEP_PAIRS)), copy, end)
        b.position_at_end(copy)
        words = raw_words(b, self._raw, b.mul(mark, number(PAIR_WEIGHTS)))
        store_words(b, words, b.gep(target, [b.mul(place, number(PAIR_WEIGHTS))]))
        b.store(b.add(mark, number(1)), self._next_mark)
        b.branch(check)
        b.position_at_end(end)


def store_words(b: Any, words: list[Any], target: Any) -> None:
    """Write a pair's weights, one vector for each unit, to a pointer to 16-bit integers that begins a cache line."""
    for unit, vector in enumerate(words):
        place = b.gep(target, [ir.Constant(I32, unit * PAIR_WEIGHTS // UNITS)])
        b.store(vector, b.bitcast(place, WORDS.as_pointer())).align = LINE_BYTES


def _step_function(module: Any) -> Any:
    """The function of a module that looks a step up: its first byte, its table, the target, `ahead` and `share`."""
    name = "look_up_step"
    if name in module.globals:
        return module.globals[name]
    byte = ir.IntType(8).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte] * 4 + [ir.IntType(64)]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    coded, table, target, ahead, share = function.args
    table, target = vector_at(b, table, _BYTES), b.bitcast(target, ir.IntType(16).as_pointer())
    for pair in range(STEP_PAIRS):
        number = ir.Constant(ir.IntType(64), pair)
        prefetch_share(b, ahead, (ir.Constant(number.type, 0), share), number)
        prefetch_at(b, coded, ir.Constant(number.type, pair * PAIR_BYTES + FETCHED_BYTES), is_near=True)
        words = _coded_words(b, coded, table, number)
        store_words(b, words, b.gep(target, [ir.Constant(I32, pair * PAIR_WEIGHTS)]))
    b.ret_void()
    return function


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
