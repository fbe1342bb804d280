"""The inner products of `bfloat16_amx_cpu`: one or two row tiles of AMX times a stretch of a tile of outputs.

Weights lie as `bfloat16_cpu` and `coded_weights` put them: 32 outputs of two inputs each, and then the next two inputs.
So 16 such pairs are two tiles of weights. All functions here work inside `numba.njit` only, on flat C-contiguous arrays
and element offsets; nothing is bounds-checked.
"""

from __future__ import annotations

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
from quant.kernels.bfloat16_ops import INPUTS, LINES, PAIR_WEIGHTS, loop_as_written, prefetch_share, vector_at
from quant.kernels.coded_ops import HAS_TABLES, PAIR_BYTES, PairReader
from quant.kernels.gates_ops import output_columns, write_tile
from quant.kernels.simd import F32, I32, array_data, prefetch_at

STEP_PAIRS = 16
STEP_INPUTS = STEP_PAIRS * INPUTS
"""Inputs that an instruction takes."""
STEP_WEIGHTS = STEP_PAIRS * PAIR_WEIGHTS
AHEAD = 2
"""Steps between the writing of weights that were coded and their use: a tile waits for what was written just before."""
KEPT_STEPS = 8
"""Steps whose weights a single block keeps, a power of two that is more than `AHEAD`: they stay in the L1 cache."""
NEAR_BYTES = 1024
"""Bytes before their use coded weights are asked for, into the L1 cache. Without that few rows wait for memory."""
_FLOAT_BYTES = 4
_FLOATS, _WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class Block(NamedTuple):
    """One or two row tiles times a stretch of a tile's inputs, whose weights begin at element `first_weight`."""

    first_row: Any
    """Where the rows' inputs of the stretch begin in x."""
    next_rows: Any
    """Elements from the first row tile's inputs to the second's; 0: there is no second."""
    tile_rows: Any
    """Rows of a tile."""
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
    b: Any, x: Any, sums: Any, block: Block, weights_at: Callable[[Any], Any], begin_step: Callable[[Any], None]
) -> None:
    """The code of a block: sums are those of the first row tile with both units, then those of the second.

    So every tile that is loaded is used twice, or once with one row tile.
    `begin_step` makes what prepares a step, `AHEAD` steps before its use; `weights_at` returns the pointer to a step's
    weights.
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
        starts = [block.first_row, b.add(block.first_row, block.next_rows)][:num_tiles]
        for step in range(AHEAD):
            with b.if_then(b.icmp_signed("<", number(step), block.num_steps)):
                begin_step(number(step))
        with loop_as_written(b, block.num_steps) as loop:
            following = b.add(loop.index, number(AHEAD))
            with b.if_then(b.icmp_signed("<", following, block.num_steps)):
                begin_step(following)
            weights = weights_at(loop.index)
            down = b.mul(b.mul(loop.index, number(STEP_INPUTS)), block.tile_rows)
            for r, start in enumerate(starts):
                load_tile(b, ROWS[r], b.gep(x, [b.add(start, down)]), row_stride)
                for unit, tile in enumerate(WEIGHTS):
                    if r == 0:
                        load_weights(b, tile, unit, weights)
                    add_products(b, BFLOAT16, SUMS[UNITS * r + unit], ROWS[r], tile)
        for tile, place in places.items():
            store_tile(b, tile, place, sums_stride)

    with b.if_else(b.icmp_signed("==", block.next_rows, number(0))) as (one, two):
        with one:
            for_rows(1)
        with two:
            for_rows(2)


@intrinsic
def multiply_tiles(typing_context, x, w, ahead, sums, block):  # type: ignore[no-untyped-def]
    """Row tiles times a stretch of weights as they are, or as `multiply_coded_tiles` wrote them.

    x uint16 [row tiles, k_size / 32, rows, 32]; w uint16 [tiles, pairs, OUTPUTS, 2]; `ahead` the array that the next
    weights are in; sums float32; `block` a tuple of the fields of `Block`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not COMPILES_AMX:  # LLVM would end the process
            return context.get_dummy_value()
        x, w, ahead, sums = (array_data(context, b, signature, args, i) for i in range(4))
        block = Block(*cgutils.unpack_tuple(b, args[4]))

        def weights_at(step: Any) -> Any:
            return b.gep(w, [b.add(block.first_weight, b.mul(step, ir.Constant(step.type, STEP_WEIGHTS)))])

        def begin_step(step: Any) -> None:
            with cgutils.for_range(b, block.num_lines) as lines:
                line = b.add(b.mul(step, block.num_lines), lines.index)
                prefetch_at(b, ahead, b.add(block.ahead, b.mul(line, ir.Constant(line.type, LINE_BYTES))))

        ahead = b.bitcast(ahead, ir.IntType(8).as_pointer())
        _make_block(b, x, sums, block, weights_at, begin_step)
        return context.get_dummy_value()

    return types.none(x, w, ahead, sums, BLOCK), codegen


@intrinsic
def multiply_coded_tiles(  # type: ignore[no-untyped-def]
    typing_context, x, coded, tables, raw, marks, scratch, sums, block, tile, pair, mark, mask
):
    """Row tiles times a stretch of coded weights, which are written down for the blocks that follow.

    The arrays are those of `coded_weights.CodedWeights`, `pair` is the stretch's first, of outputs `tile`, and `mark`
    the first mark that is not before it. Scratch uint16 gets [steps, pairs, OUTPUTS, 2] from `block.first_weight` on;
    step s is at `s & mask`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not (COMPILES_AMX and HAS_TABLES):  # LLVM would end the process
            return context.get_dummy_value()
        x, coded, tables, raw, marks, scratch, sums = (array_data(context, b, signature, args, i) for i in range(7))
        block = Block(*cgutils.unpack_tuple(b, args[7]))
        tile, first_pair, mark, mask = args[8:]
        reader = PairReader(b, coded, tables, raw, marks, tile, mark)

        def number(value: int) -> ir.Constant:
            return ir.Constant(mask.type, value)

        def weights_at(step: Any) -> Any:
            return b.gep(scratch, [b.add(block.first_weight, b.mul(b.and_(step, mask), number(STEP_WEIGHTS)))])

        def begin_step(step: Any) -> None:
            place = weights_at(step)
            with loop_as_written(b, number(STEP_PAIRS)) as loop:
                index = loop.index
                pair = b.add(b.mul(step, number(STEP_PAIRS)), index)
                share = b.mul(block.num_lines, number(LINE_BYTES // (STEP_PAIRS * LINES)))
                prefetch_share(b, coded, (block.ahead, share), pair)
                fetched = b.add(b.mul(b.add(first_pair, pair), number(PAIR_BYTES)), number(NEAR_BYTES))
                prefetch_at(b, coded, fetched, is_near=True)
                words = reader.read(b.add(first_pair, pair))
                for unit, vector in enumerate(words):
                    offset = b.add(b.mul(index, number(PAIR_WEIGHTS)), number(unit * LANES * INPUTS))
                    b.store(vector, b.bitcast(b.gep(place, [offset]), _WORDS.as_pointer())).align = LINE_BYTES

        _make_block(b, x, sums, block, weights_at, begin_step)
        return context.get_dummy_value()

    at = types.intp
    return types.none(x, coded, tables, raw, marks, scratch, sums, BLOCK, at, at, at, at), codegen


@intrinsic
def write_rows(typing_context, sums, place, bias, out, row, count, tile, gates, width):  # type: ignore[no-untyped-def]
    """Write sums float32 [count, OUTPUTS], which lie from `place` on, plus their biases, as rows of out from `row` on.

    `gates` and `width` are those of `gates_ops.write_tile`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        sums, bias, out = (array_data(context, b, signature, args, i) for i in (0, 2, 3))
        place, row, count, tile, gates, width = (args[i] for i in (1, 4, 5, 6, 7, 8))

        def number(value: int) -> ir.Constant:
            return ir.Constant(place.type, value)

        columns = output_columns(b, tile, gates, UNITS, LANES)
        biases = [vector_at(b, b.gep(bias, [column]), _FLOATS) for column in columns]
        with cgutils.for_range(b, count) as loop:
            at = b.add(place, b.mul(loop.index, number(OUTPUTS)))
            lines = [vector_at(b, b.gep(sums, [b.add(at, number(unit * LANES))]), _FLOATS) for unit in range(UNITS)]
            results = [b.fadd(line, more) for line, more in zip(lines, biases, strict=True)]
            write_tile(b, out, b.add(row, loop.index), [results], columns, gates, width)
        return context.get_dummy_value()

    at = types.intp
    return types.none(sums, at, bias, out, at, at, at, at, at), codegen
