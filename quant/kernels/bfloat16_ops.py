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
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.gates_ops import output_columns, write_tile
from quant.kernels.simd import (
    F32,
    I32,
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
PAIR_WEIGHTS = OUTPUTS * INPUTS
"""Weights of a tile's pair of inputs."""
LINES = 2
"""Cache lines that are asked for with each pair of inputs, whose weights are two, or one and a half where coded."""
WEIGHT_BYTES = 2
INTERLEAVED_PAIRS = 16
"""Pairs of an output's inputs that are moved at a time: a cache line. What is written stays in the cache meanwhile."""
ROWS = 12
"""Rows at most, whose sums take 24 of 32 registers: weights take two, or four where they are taken apart."""
HAS_PAIRS = {"avx512bf16", "avx512dq"} <= enabled_features()
"""Whether one instruction adds a pair of products. Attention's powers need AVX512-DQ beside it (`powers.short_exp2`),
which every processor with the one has."""
ROUNDED = np.uint16 if HAS_PAIRS else np.float32
"""How rounded activations are stored: as the bits of a bfloat16, or widened again."""

_FLOATS, WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


def add_pair(b: Any, x: Any, w: Any, total: Any) -> Any:
    """total + two products for every lane, by AVX512-BF16; x and w words."""
    signature = ir.FunctionType(_FLOATS, [_FLOATS, WORDS, WORDS])
    function = cgutils.get_or_insert_function(b.module, signature, "llvm.x86.avx512bf16.dpbf16ps.512")
    return b.call(function, [total, x, w])


def round_two(b: Any, low: Any, high: Any) -> Any:
    """Two vectors of float32 as the nearest bfloat16, one after the other, by AVX512-BF16: words, pair by pair."""
    signature = ir.FunctionType(ir.VectorType(ir.IntType(16), 2 * LANES), [_FLOATS, _FLOATS])
    function = cgutils.get_or_insert_function(b.module, signature, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    return b.bitcast(b.call(function, [high, low]), WORDS)


def _halves(b: Any, words: Any) -> tuple[Any, Any]:
    """The first and the second number of each pair, as float32."""
    upper, sixteen = (ir.Constant(WORDS, [value] * LANES) for value in (-1 << 16, 16))
    return b.bitcast(b.shl(words, sixteen), _FLOATS), b.bitcast(b.and_(words, upper), _FLOATS)


def rounded_lanes(b: Any, value: Any) -> Any:
    """The nearest bfloat16 of `LANES` numbers, as bits of 16-bit lanes, by the instruction of AVX512-BF16."""
    halves = ir.VectorType(ir.IntType(16), LANES)
    name, signature = "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.FunctionType(halves, [_FLOATS])
    return b.call(cgutils.get_or_insert_function(b.module, signature, name), [value])


@intrinsic
def round_vector(typing_context, x, source, rounded, target):  # type: ignore[no-untyped-def]
    """Write the nearest bfloat16 of `LANES` numbers of x float32, from `source` on, to `rounded`, from `target` on.

    `rounded` has dtype `ROUNDED`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        places = [b.gep(array_data(context, b, signature, args, i), [args[i + 1]]) for i in (0, 2)]
        value = b.load(b.bitcast(places[0], _FLOATS.as_pointer()))
        value.align = 4
        if signature.args[2].dtype == types.uint16:
            result = rounded_lanes(b, value)
        else:
            bits = b.zext(bfloat16_bits(b, value), WORDS)
            result = b.bitcast(b.shl(bits, ir.Constant(WORDS, [16] * LANES)), _FLOATS)
        b.store(result, b.bitcast(places[1], result.type.as_pointer())).align = 2
        return context.get_dummy_value()

    return types.none(x, types.intp, rounded, types.intp), codegen


class Work(NamedTuple):
    """What a block computes: some rows times the stretch `first : last` of a tile's inputs."""

    place: Any
    """Where its sums wait."""
    row: Any
    """The first."""
    tile: Any
    """Counted in tiles of outputs."""
    gates: Any
    """This and `width` are those of `gates_ops.write_tile`."""
    width: Any
    k_size: Any
    first: Any
    last: Any


WORK = types.UniTuple(types.intp, len(Work._fields))
"""How a kernel passes it: a tuple."""


@dataclasses.dataclass
class Block:
    """The code of a block while it is made, whatever the form of its weights: its sums, and their way to `out`.

    x, bias, out and waiting are typed pointers.
    """

    builder: Any
    x: Any
    bias: Any
    out: Any
    waiting: Any
    work: Work
    rows: int
    is_paired: bool

    def number(self, value: int) -> ir.Constant:
        return ir.Constant(self.work.k_size.type, value)

    def begin(self) -> None:
        """The sums: zeros, or what waits of the inputs before."""
        b = self.builder
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        self._sums = [[cgutils.alloca_once_value(b, zero) for _ in range(UNITS)] for _ in range(self.rows)]
        with b.if_then(b.icmp_signed(">", self.work.first, self.number(0))):
            for r, unit, kept in self._places():
                b.store(vector_at(b, self._waiting_place(r, unit), _FLOATS), kept)
        starts = [b.mul(b.add(self.work.row, self.number(r)), self.work.k_size) for r in range(self.rows)]
        self._x_rows = [b.gep(self.x, [b.add(start, self.work.first)]) for start in starts]

    def loop(self) -> contextlib.AbstractContextManager[Any]:
        """A loop over the stretch's pairs of inputs."""
        num_inputs = self.builder.sub(self.work.last, self.work.first)
        return loop_as_written(self.builder, self.builder.sdiv(num_inputs, self.number(INPUTS)))

    def next_weights(self, part: Any, parts: Any, pair_bytes: int) -> tuple[Any, Any]:
        """Where one `part` of `parts` of the weights behind the stretch's begins, and the step from line to line."""
        b, work = self.builder, self.work

        def num_bytes(num_weights: Any) -> Any:
            return b.mul(b.sdiv(num_weights, self.number(INPUTS)), self.number(pair_bytes))

        begin = num_bytes(b.add(b.mul(work.tile, work.k_size), work.first))
        size = num_bytes(b.sub(work.last, work.first))
        return next_tile_part(b, begin, size, part, parts, pair_bytes // LINES)

    def add(self, pair: Any, weights: Sequence[Any]) -> None:
        """Add the products of the stretch's pair of inputs `pair`; weights are its words, one vector for each unit."""
        b = self.builder
        halves = [] if self.is_paired else [_halves(b, words) for words in weights]
        for x_row, places in zip(self._x_rows, self._sums, strict=True):
            numbers_at = b.gep(x_row, [b.mul(pair, self.number(INPUTS))])
            if self.is_paired:
                numbers = [spread(b, b.load(b.bitcast(numbers_at, I32.as_pointer())), LANES)]
            else:
                halves_at = [b.gep(numbers_at, [self.number(half)]) for half in range(INPUTS)]
                numbers = [spread(b, b.load(half_at), LANES) for half_at in halves_at]
            for unit, kept in enumerate(places):
                total = b.load(kept)
                if self.is_paired:
                    total = add_pair(b, numbers[0], weights[unit], total)
                else:
                    total = vector_call(b, "fma", numbers[1], halves[unit][1], total)
                    total = vector_call(b, "fma", numbers[0], halves[unit][0], total)
                b.store(total, kept)

    def end(self) -> None:
        """Let the sums wait for the inputs that follow, or write the outputs."""
        b = self.builder
        with b.if_else(b.icmp_signed("<", self.work.last, self.work.k_size)) as (going_on, ending):
            with going_on:
                for r, unit, kept in self._places():
                    b.store(b.load(kept), b.bitcast(self._waiting_place(r, unit), _FLOATS.as_pointer())).align = 4
            with ending:
                columns = output_columns(b, self.work.tile, self.work.gates, UNITS, LANES)
                added = [vector_at(b, b.gep(self.bias, [column]), _FLOATS) for column in columns]
                results = [
                    [b.fadd(b.load(kept), more) for kept, more in zip(places, added, strict=True)]
                    for places in self._sums
                ]
                write_tile(b, self.out, self.work.row, results, columns, self.work.gates, self.work.width)

    def _places(self) -> Iterator[tuple[int, int, Any]]:
        for r, places in enumerate(self._sums):
            for unit, kept in enumerate(places):
                yield r, unit, kept

    def _waiting_place(self, r: int, unit: int) -> Any:
        return self.builder.gep(
            self.waiting, [self.builder.add(self.work.place, self.number(r * OUTPUTS + unit * LANES))]
        )


def vector_at(b: Any, place: Any, kind: Any) -> Any:
    """Load a vector of type `kind` from an address that is a multiple of 2 bytes."""
    value = b.load(b.bitcast(place, kind.as_pointer()))
    value.align = 2
    return value


def raw_words(b: Any, w: Any, start: Any) -> list[Any]:
    """A pair's weights as words, one vector for each unit, from element `start` of w on, a typed pointer to uint16."""
    offsets = [ir.Constant(start.type, unit * LANES * INPUTS) for unit in range(UNITS)]
    return [vector_at(b, b.gep(w, [b.add(start, offset)]), WORDS) for offset in offsets]


def prefetch_share(b: Any, data: Any, ahead: tuple[Any, Any], pair: Any) -> None:
    """Ask for the `LINES` lines of bytes that are a pair's share of what follows; `ahead` is of `next_weights`."""
    start, step = ahead
    for line in range(LINES):
        index = b.add(b.mul(pair, ir.Constant(pair.type, LINES)), ir.Constant(pair.type, line))
        prefetch_at(b, data, b.add(start, b.mul(index, step)))


def for_each_count(b: Any, count: Any, make: Callable[[int], None], max_count: int = ROWS) -> None:
    """Code for each number of rows from 1 to `max_count`; `count` says at run time which."""
    end, unreachable = b.append_basic_block("end"), b.append_basic_block("others")
    switch = b.switch(count, unreachable)
    for rows in range(1, max_count + 1):
        block = b.append_basic_block(f"rows{rows}")
        switch.add_case(ir.Constant(count.type, rows), block)
        b.position_at_end(block)
        make(rows)
        b.branch(end)
    b.position_at_end(unreachable)
    b.unreachable()
    b.position_at_end(end)


@contextlib.contextmanager
def loop_as_written(b: Any, count: Any) -> Iterator[Any]:
    """`cgutils.for_range` that LLVM does not unroll: with two turns at once it would run out of registers."""
    with cgutils.for_range(b, count) as loop:
        yield loop
        last = b.block
    unrolling = b.module.add_metadata(["llvm.loop.unroll.disable"])
    node = b.module.add_metadata([unrolling, last.name])  # no other loop's node
    node.operands = [node, unrolling]  # LLVM wants a loop's node to refer to itself first
    last.terminator.set_metadata("llvm.loop", node)


@intrinsic
def multiply_block(typing_context, x, w, bias, out, waiting, rows, work, part, parts):  # type: ignore[no-untyped-def]
    """`rows` rows, at least one and at most `ROWS`, times inputs `first : last` of a tile of `OUTPUTS` outputs.

    x [*, k_size] as `round_vector` makes it; w uint16 [tiles, input pairs, OUTPUTS, 2]; bias [outputs]; out [*, width]
    float32; `work` a tuple of the fields of `Work`. Until the last inputs the sums wait in `waiting` float32,
    [rows, OUTPUTS] from `place` on.

    One `part` of `parts` of as many weights that follow is asked for meanwhile (`work_split.fetched_part`).
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, w, bias, out, waiting = (array_data(context, b, signature, args, i) for i in range(5))
        count, numbers, part, parts = args[5:]
        work = Work(*cgutils.unpack_tuple(b, numbers))
        is_paired = signature.args[0].dtype == types.uint16
        data = b.bitcast(w, ir.IntType(8).as_pointer())

        def make(rows: int) -> None:
            block = Block(b, x, bias, out, waiting, work, rows, is_paired)
            block.begin()
            begin = b.mul(b.add(b.mul(work.tile, work.k_size), work.first), block.number(OUTPUTS))
            ahead = block.next_weights(part, parts, PAIR_WEIGHTS * WEIGHT_BYTES)
            with block.loop() as loop:
                prefetch_share(b, data, ahead, loop.index)
                w_at = b.add(begin, b.mul(loop.index, block.number(PAIR_WEIGHTS)))
                block.add(loop.index, raw_words(b, w, w_at))
            block.end()

        for_each_count(b, count, make)
        return context.get_dummy_value()

    at = types.intp
    return types.none(x, w, bias, out, waiting, at, WORK, at, at), codegen
