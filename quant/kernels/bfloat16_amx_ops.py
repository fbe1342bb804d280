"""The inner products of `bfloat16_amx_cpu`: one or two row tiles of AMX times a stretch of a tile of outputs.

Weights lie as `bfloat16_cpu` and `coded_weights` put them: 32 outputs of two inputs each, and then the next two inputs.
So 16 such pairs are two tiles of weights. All functions here work inside `numba.njit` only, on flat C-contiguous arrays
and element offsets; nothing is bounds-checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.amx import (
    BFLOAT16,
    COMPILES_AMX,
    LANES,
    OUTPUTS,
    ROWS,
    SUMS,
    UNITS,
    WEIGHTS,
    add_products,
    clear_tile,
    load_tile,
    load_weights,
    store_tile,
)
from quant.kernels.arrays import LINE_BYTES
from quant.kernels.bfloat16_ops import (
    INPUTS,
    LINES,
    PAIR_WEIGHTS,
    add_pair,
    loop_as_written,
    prefetch_share,
    raw_words,
    vector_at,
)
from quant.kernels.coded_ops import HAS_TABLES, PAIR_BYTES, STEP_PAIRS, PairReader, StepWriter, store_words
from quant.kernels.finished_rows_ops import FINISHED, FinishedRows, RowWriter
from quant.kernels.simd import F32, I32, array_data, prefetch_at, spread

STEP_WEIGHTS = STEP_PAIRS * PAIR_WEIGHTS
AHEAD = 2
"""Steps between the writing of weights that were coded and their use: a tile waits for what was written just before."""
KEPT_STEPS = 8
"""Steps whose weights a single block keeps, a power of two that is more than `AHEAD`: they stay in the L1 cache."""
NEAR_BYTES = 1024
"""How far ahead coded weights are asked for, into the L1 cache, where pairs are read one by one. Without that few rows
wait for the memory; a whole step at once needs more (`coded_ops.FETCHED_BYTES`)."""
_FLOAT_BYTES = 4
_FLOATS, _WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_HALVES = [ir.Constant(_WORDS, [mask] * LANES) for mask in ((1 << 16) - 1, -1 << 16)]
"""Masks of the first and the second number of each pair."""


class Block(NamedTuple):
    """One or two row tiles times a stretch of a tile's inputs, whose weights begin at element `first_weight`."""

    first_row: Any
    """Where the rows' inputs of the stretch begin in x."""
    next_rows: Any
    """Where the second row tile's begin; 0: there is none."""
    tile_rows: Any
    """Rows of a tile."""
    step_size: Any
    """Elements from a step's inputs of the first row tile to the next step's."""
    next_step_size: Any
    """Elements from a step's inputs of the second row tile to the next step's."""
    num_steps: Any
    first_weight: Any
    is_first: Any
    """1: sums begin with zeros. Otherwise they go on from what waits in `sums`, from `place` on, [rows, OUTPUTS]."""
    place: Any
    ahead: Any
    """The first of the bytes of weights that are asked for meanwhile."""
    num_lines: Any
    """Lines of those that each step asks for."""


BLOCK = types.UniTuple(types.intp, len(Block._fields))
"""How a kernel passes it: a tuple."""


def _make_block(
    b: Any,
    x: Any,
    sums: Any,
    block: Block,
    weights_at: Callable[[Any], Any],
    begin_step: Callable[[Any], None],
    end_step: Callable[[Any], None],
) -> None:
    """The code of a block: sums are those of the first row tile with both units, then those of the second.

    So every tile that is loaded is used twice, or once with one row tile.
    `begin_step` makes what prepares a step, `AHEAD` steps before its use; `weights_at` returns the pointer to a step's
    weights; `end_step` makes what else a step does, while its products are added.
    """

    def number(value: int) -> ir.Constant:
        return ir.Constant(block.place.type, value)

    row_stride, sums_stride = number(LINE_BYTES), number(OUTPUTS * _FLOAT_BYTES)

    def for_rows(num_tiles: int) -> None:
        places = {}
        for index, tile in enumerate(SUMS[: UNITS * num_tiles]):
            down = b.mul(number(index // UNITS * OUTPUTS), block.tile_rows)
            places[tile] = b.gep(sums, [b.add(b.add(block.place, down), number(index % UNITS * LANES))])
        with b.if_else(b.icmp_signed("!=", block.is_first, number(0))) as (begin, go_on):
            with begin:
                for tile in places:
                    clear_tile(b, tile)
            with go_on:
                for tile, place in places.items():
                    load_tile(b, tile, place, sums_stride)
        starts = ((block.first_row, block.step_size), (block.next_rows, block.next_step_size))[:num_tiles]
        for step in range(AHEAD):
            with b.if_then(b.icmp_signed("<", number(step), block.num_steps)):
                begin_step(number(step))
        with loop_as_written(b, block.num_steps) as loop:
            following = b.add(loop.index, number(AHEAD))
            with b.if_then(b.icmp_signed("<", following, block.num_steps)):
                begin_step(following)
            weights = weights_at(loop.index)
            for r, (start, step_size) in enumerate(starts):
                load_tile(b, ROWS[r], b.gep(x, [b.add(start, b.mul(loop.index, step_size))]), row_stride)
                for unit, tile in enumerate(WEIGHTS):
                    if r == 0:
                        load_weights(b, tile, unit, weights)
                    add_products(b, BFLOAT16, SUMS[UNITS * r + unit], ROWS[r], tile)
            end_step(loop.index)
        for tile, place in places.items():
            store_tile(b, tile, place, sums_stride)

    with b.if_else(b.icmp_signed("==", block.next_rows, number(0))) as (one, two):
        with one:
            for_rows(1)
        with two:
            for_rows(2)


def _rows_beside(b: Any, block: Block, writer: RowWriter, finished: FinishedRows) -> Callable[[Any], None]:
    """The `end_step` of a block each step of which writes as many of the finished rows as any other, or fewer."""
    one = ir.Constant(finished.count.type, 1)
    rows_each = b.sdiv(b.sub(b.add(finished.count, block.num_steps), one), block.num_steps)

    def end_step(step: Any) -> None:
        first = b.mul(step, rows_each)
        left = b.sub(finished.count, first)
        with cgutils.for_range(b, b.select(b.icmp_signed("<", left, rows_each), left, rows_each)) as rows:
            writer.write(b.add(first, rows.index))

    return end_step


@intrinsic
def multiply_tiles(typing_context, x, w, ahead, bias, out, sums, block, finished):  # type: ignore[no-untyped-def]
    """Row tiles times a stretch of weights as they are, or as `multiply_coded_tiles` wrote them.

    x uint16 [row tiles, k_size / 32, rows, 32]; w uint16 [tiles, pairs, OUTPUTS, 2]; `ahead` the array that the next
    weights are in; sums float32; `block` a tuple of the fields of `Block`. Each step writes some of the rows that
    `finished`, a tuple too, says to be finished.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:  # LLVM would end the process
            return context.get_dummy_value()
        x, w, ahead, bias, out, sums = (array_data(context, b, signature, args, i) for i in range(6))
        block, finished = Block(*cgutils.unpack_tuple(b, args[6])), FinishedRows(*cgutils.unpack_tuple(b, args[7]))

        def weights_at(step: Any) -> Any:
            return b.gep(w, [b.add(block.first_weight, b.mul(step, ir.Constant(step.type, STEP_WEIGHTS)))])

        def begin_step(step: Any) -> None:
            with cgutils.for_range(b, block.num_lines) as lines:
                line = b.add(b.mul(step, block.num_lines), lines.index)
                prefetch_at(b, ahead, b.add(block.ahead, b.mul(line, ir.Constant(line.type, LINE_BYTES))))

        end_step = _rows_beside(b, block, RowWriter(b, sums, bias, out, finished), finished)
        ahead = b.bitcast(ahead, ir.IntType(8).as_pointer())
        _make_block(b, x, sums, block, weights_at, begin_step, end_step)
        return context.get_dummy_value()

    return types.none(x, w, ahead, bias, out, sums, BLOCK, FINISHED), codegen


@intrinsic
def multiply_coded_tiles(  # type: ignore[no-untyped-def]
    typing_context, x, coded, tables, raw, marks, scratch, bias, out, sums, block, finished, tile, pair, mark, mask
):
    """Row tiles times a stretch of coded weights, which are written down for the blocks that follow.

    The arrays are those of `coded_weights.CodedWeights`, `pair` is the stretch's first, of outputs `tile`, and `mark`
    the first mark that is not before it. Scratch uint16 gets [steps, pairs, OUTPUTS, 2] from `block.first_weight` on;
    step s is at `s & mask`. Where no block follows, `mask` is 0 or more: weights wait for the memory then, and pairs
    that are read one by one ask for it more evenly. `finished` is that of `multiply_tiles`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not (COMPILES_AMX and HAS_TABLES):  # LLVM would end the process
            return context.get_dummy_value()
        x, coded, tables, raw, marks, scratch, bias, out, sums = (
            array_data(context, b, signature, args, i) for i in range(9)
        )
        block, finished = Block(*cgutils.unpack_tuple(b, args[9])), FinishedRows(*cgutils.unpack_tuple(b, args[10]))
        tile, first_pair, mark, mask = args[11:]
        steps = StepWriter(b, coded, tables, raw, marks, tile, mark)
        pairs = PairReader(b, coded, tables, raw, marks, tile, mark)

        def number(value: int) -> ir.Constant:
            return ir.Constant(mask.type, value)

        def weights_at(step: Any) -> Any:
            return b.gep(scratch, [b.add(block.first_weight, b.mul(b.and_(step, mask), number(STEP_WEIGHTS)))])

        def begin_step(step: Any) -> None:
            share = _share_of_pair(b, block)
            first, place = b.mul(step, number(STEP_PAIRS)), weights_at(step)
            with b.if_else(b.icmp_signed("<", mask, number(0))) as (all_at_once, one_by_one):
                with all_at_once:
                    ahead = b.add(block.ahead, b.mul(first, b.mul(share, number(LINES))))
                    steps.write(b.add(first_pair, first), place, ahead, share)
                with one_by_one, loop_as_written(b, number(STEP_PAIRS)) as loop:
                    index = b.add(first, loop.index)
                    prefetch_share(b, coded, (block.ahead, share), index)
                    pair = b.add(first_pair, index)
                    fetched = b.add(b.mul(pair, number(PAIR_BYTES)), number(NEAR_BYTES))
                    prefetch_at(b, coded, fetched, is_near=True)
                    store_words(b, pairs.read(pair), b.gep(place, [b.mul(loop.index, number(PAIR_WEIGHTS))]))

        end_step = _rows_beside(b, block, RowWriter(b, sums, bias, out, finished), finished)
        _make_block(b, x, sums, block, weights_at, begin_step, end_step)
        return context.get_dummy_value()

    at = types.intp
    return types.none(x, coded, tables, raw, marks, scratch, bias, out, sums, BLOCK, FINISHED, at, at, at, at), codegen


def _share_of_pair(b: Any, block: Block) -> Any:
    """Bytes from one of the `LINES` lines that a pair asks for ahead to the next one."""
    return b.mul(block.num_lines, ir.Constant(block.num_lines.type, LINE_BYTES // (STEP_PAIRS * LINES)))


def _add_as_tiles(b: Any, left: Any, right: Any) -> Any:
    """The sum of two vectors, 0 of its sign where it is below 2^-126: so does the unit that multiplies tiles."""
    total = b.fadd(left, right)
    size, sign = (ir.Constant(_WORDS, [mask] * LANES) for mask in ((1 << 31) - 1, -1 << 31))
    bits = b.bitcast(total, _WORDS)
    is_small = b.icmp_unsigned("<", b.and_(bits, size), ir.Constant(_WORDS, [1 << 23] * LANES))
    return b.bitcast(b.select(is_small, b.and_(bits, sign), bits), _FLOATS)


@intrinsic
def multiply_row(  # type: ignore[no-untyped-def]
    typing_context, x, w, coded, tables, raw, marks, sums, block, tile, pair, mark
):
    """One row times a stretch of weights, coded ones if there are any, with the bits that tiles give.

    Its weights go from memory to registers and no further. AVX512-BF16 adds both products of a pair to one sum. So the
    sum of the even inputs takes pairs whose second number is 0 in both factors, the other one pairs whose first is.
    w is that of `multiply_tiles`, the other arguments are those of `multiply_coded_tiles`; of `block` one row needs
    neither the second row tile nor sizes.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:
            return context.get_dummy_value()
        x, w, coded, tables, raw, marks, sums = (array_data(context, b, signature, args, i) for i in range(7))
        block = Block(*cgutils.unpack_tuple(b, args[7]))
        tile, first_pair, mark = args[8:]

        def number(value: int) -> ir.Constant:
            return ir.Constant(mark.type, value)

        def make(data: Any, words_of: Callable[[Any], list[Any]]) -> None:
            places = [b.gep(sums, [b.add(block.place, number(unit * LANES))]) for unit in range(UNITS)]
            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            is_first = b.icmp_signed("!=", block.is_first, number(0))
            totals = [
                cgutils.alloca_once_value(b, b.select(is_first, zero, vector_at(b, place, _FLOATS))) for place in places
            ]
            apart = [[cgutils.alloca_once(b, _FLOATS) for _ in range(INPUTS)] for _ in range(UNITS)]
            share = _share_of_pair(b, block)
            with loop_as_written(b, block.num_steps) as steps:
                for kept in itertools.chain(*apart):
                    b.store(zero, kept)
                with loop_as_written(b, number(STEP_PAIRS)) as pairs:
                    index = b.add(b.mul(steps.index, number(STEP_PAIRS)), pairs.index)
                    prefetch_share(b, data, (block.ahead, share), index)
                    x_at = b.gep(x, [b.add(block.first_row, b.mul(index, number(INPUTS)))])
                    both = spread(b, b.load(b.bitcast(x_at, I32.as_pointer())), LANES)
                    words = words_of(b.add(first_pair, index))
                    for half, mask in enumerate(_HALVES):
                        numbers = b.and_(both, mask)
                        for unit in range(UNITS):
                            kept = apart[unit][half]
                            b.store(add_pair(b, numbers, b.and_(words[unit], mask), b.load(kept)), kept)
                for kept, (even, odd) in zip(totals, apart, strict=True):
                    b.store(_add_as_tiles(b, b.load(kept), _add_as_tiles(b, b.load(even), b.load(odd))), kept)
            for kept, place in zip(totals, places, strict=True):
                b.store(b.load(kept), b.bitcast(place, _FLOATS.as_pointer())).align = LINE_BYTES

        num_coded = context.make_array(signature.args[2])(context, b, value=args[2]).nitems
        with b.if_else(b.icmp_signed("==", num_coded, number(0))) as (plain, from_codes):
            with plain:
                data = b.bitcast(w, ir.IntType(8).as_pointer())
                make(data, lambda pair: raw_words(b, w, b.mul(pair, number(PAIR_WEIGHTS))))
            with from_codes:
                if HAS_TABLES:
                    make(coded, PairReader(b, coded, tables, raw, marks, tile, mark).read)
        return context.get_dummy_value()

    at = types.intp
    return types.none(x, w, coded, tables, raw, marks, sums, BLOCK, at, at, at), codegen
