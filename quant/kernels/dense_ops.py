"""Register tiles of the dense product with float32 activations, and the two ways in which they add.

A tile is some rows of x times some rows of w: an accumulator of float32 lanes for each pair, to which the inputs are
added step by step, in order. All tiles add so, whatever their shape: a row's bits do not depend on the tile it is in.

`FLOATS`: a step is 16 inputs, and a fused multiply-add of each `WIDTH` of them. Where an input size is no multiple of
16, the last 8 are a step of their own, in which lanes beyond them add zeros. The bits depend on `WIDTH`, and so on the
processor.

`SPLIT`: the same, but with `SPLITS_PAIRS` and bfloat16 weights those of even index are added first of each 16 inputs,
then the odd ones. A pair of weights is a 32-bit word, of which two instructions make two floats. The activations must
have been put into that order before (`split_row`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.arrays import LINE_BYTES
from quant.kernels.simd import (
    F32,
    HAS_AVX512,
    I32,
    LANES,
    array_data,
    enabled_features,
    fold_sum,
    lanes_at,
    prefetch_at,
    vector_call,
)

WIDTH = 2 * LANES if HAS_AVX512 else LANES
"""Lanes of an accumulator of floats: one register with AVX-512 and with AVX, two with NEON."""
SPLITS_PAIRS = "avx2" in enabled_features() and not HAS_AVX512
"""Whether the product of floats widens bfloat16 by pairs: one vector instruction for eight, which are two elsewhere."""


@dataclasses.dataclass(frozen=True, slots=True)
class Loading:
    """How the numbers of a step are read, and so in which order they are added; `NUM_PARTS` times `WIDTH` lanes."""

    load: Callable[..., Any]
    """Makes of (builder, typed pointer, dtype, offset, `Step`) one part of a step's inputs or weights."""
    reads_behind: bool = False
    """Whether a step reads a number behind its inputs, unless it is the last."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One part of a step of `count` inputs; `is_last`: nothing behind them may be read."""

    count: int
    part: int
    is_last: bool


STEP_INPUTS = 2 * LANES
"""Inputs of a step."""
NUM_PARTS = STEP_INPUTS // WIDTH


def _load_floats(b: Any, data: Any, dtype: Any, offset: Any, step: Step) -> Any:
    start = b.add(offset, ir.Constant(offset.type, step.part * WIDTH))
    return lanes_at(b, data, dtype, start, min(step.count, WIDTH), WIDTH)


def _load_split(b: Any, data: Any, dtype: Any, offset: Any, step: Step) -> Any:
    if dtype != types.uint16 or step.count < STEP_INPUTS:
        return _load_floats(b, data, dtype, offset, step)
    words, floats = ir.VectorType(I32, WIDTH), ir.VectorType(F32, WIDTH)
    is_masked = step.part == 1 and step.is_last
    # Words that begin one number later have the odd ones in their lower halves: no mask takes a register.
    start = b.add(offset, ir.Constant(offset.type, 0 if is_masked else step.part))
    pairs = b.load(b.bitcast(b.gep(data, [start]), words.as_pointer()))
    pairs.align = dtype.bitwidth // 8
    if is_masked:
        return b.bitcast(b.and_(pairs, ir.Constant(words, [-1 << 16] * WIDTH)), floats)
    return b.bitcast(b.shl(pairs, ir.Constant(words, [16] * WIDTH)), floats)


FLOATS = Loading(_load_floats)
SPLIT = Loading(_load_split, reads_behind=True) if SPLITS_PAIRS else FLOATS


@intrinsic
def splits_pairs(typing_context, w):  # type: ignore[no-untyped-def]
    """Whether `SPLIT` takes activations that `split_row` has ordered, with weights like w."""
    is_split = SPLITS_PAIRS and w.dtype == types.uint16
    return types.boolean(w), lambda context, b, signature, args: ir.Constant(ir.IntType(1), is_split)


@intrinsic
def _split_16(typing_context, x, out, at):  # type: ignore[no-untyped-def]
    """Sixteen numbers of x to the same place of `out`: those of even index first."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x_data, out_data = (array_data(context, b, signature, args, i) for i in (0, 1))
        undefined = ir.Constant(ir.VectorType(F32, 16), ir.Undefined)
        order = ir.Constant(ir.VectorType(I32, 16), [*range(0, 16, 2), *range(1, 16, 2)])
        numbers = lanes_at(b, x_data, types.float32, args[2], 16, 16)
        place = b.bitcast(b.gep(out_data, [args[2]]), numbers.type.as_pointer())
        b.store(b.shuffle_vector(numbers, undefined, order), place).align = 4
        return context.get_dummy_value()

    return types.none(x, out, types.intp), codegen


@njit(inline="always")
def split_row(x, row, k_size, split):  # type: ignore[no-untyped-def]
    """Write a row of x [rows, k_size] to the same place of `split`, in the order of `SPLIT`."""
    first, end = row * k_size, (row + 1) * k_size
    rest = end - k_size % STEP_INPUTS
    for k in range(first, rest, STEP_INPUTS):
        _split_16(x, split, k)
    for k in range(rest, end):
        split[k] = x[k]


def make_tile(rows: int, outputs: int, ahead: int, loading: Loading = FLOATS, *, lines: int = 1) -> Any:
    """`rows` rows of x times `outputs` rows of w, as a Numba intrinsic.

    x, w flat arrays, of which the first rows begin at x0 and w0; the result of the first pair goes to out[o0], after
    bias[n] was added. Weights are asked for `ahead` rows before their use, `lines` cache lines a step; 0: the processor
    is left to guess. The number of inputs is a multiple of `LANES`.
    """

    @intrinsic
    def tile(typing_context, x, x0, w, w0, k_size, bias, n, out, o0, n_size):  # type: ignore[no-untyped-def]
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x_data, w_data, bias_data, out_data = (array_data(context, b, signature, args, i) for i in (0, 2, 5, 7))
            x0, w0, k_size, n, o0, n_size = (args[i] for i in (1, 3, 4, 6, 8, 9))
            x_rows = TileRows(x_data, signature.args[0].dtype, spaced(b, x0, k_size, rows))
            w_rows = TileRows(w_data, signature.args[2].dtype, spaced(b, w0, k_size, outputs))
            body = Tile(b, loading, x_rows, w_rows, k_size)
            body.add(body.number(0), k_size, ahead, lines)
            body.write(bias_data, n, out_data, spaced(b, o0, n_size, rows))
            return context.get_dummy_value()

        at = types.intp
        return types.none(x, at, w, at, at, bias, at, out, at, at), codegen

    return tile


def make_part_tile(rows: int, outputs: int, loading: Loading = FLOATS) -> Any:
    """As `make_tile`, but only the inputs from `first_k` to `last_k` are added.

    Between the parts the sums are kept in `sums` [rows * outputs * WIDTH] from s0 on.
    """

    @intrinsic
    def tile(typing_context, x, x0, w, w0, k_size, first_k, last_k, sums, s0, bias, n, out, o0, n_size):  # type: ignore[no-untyped-def]
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x_data, w_data, sums_data, bias_data, out_data = (
                array_data(context, b, signature, args, i) for i in (0, 2, 7, 9, 11)
            )
            x0, w0, k_size, first_k, last_k, s0, n, o0, n_size = (args[i] for i in (1, 3, 4, 5, 6, 8, 10, 12, 13))
            x_rows = TileRows(x_data, signature.args[0].dtype, spaced(b, x0, k_size, rows))
            w_rows = TileRows(w_data, signature.args[2].dtype, spaced(b, w0, k_size, outputs))
            body = Tile(b, loading, x_rows, w_rows, k_size)
            kept = b.gep(sums_data, [s0])
            body.take(kept, b.icmp_signed("==", first_k, body.number(0)))
            body.add(first_k, last_k)
            with b.if_else(b.icmp_signed("==", last_k, k_size)) as (is_last, is_earlier):
                with is_last:
                    body.write(bias_data, n, out_data, spaced(b, o0, n_size, rows))
                with is_earlier:
                    body.keep(kept)
            return context.get_dummy_value()

        at = types.intp
        return types.none(x, at, w, at, at, at, at, sums, at, bias, at, out, at, at), codegen

    return tile


def spaced(b: Any, first: Any, stride: Any, count: int) -> list[Any]:
    """The offsets of `count` rows, the first at `first`, each `stride` behind the one before."""
    return [b.add(first, b.mul(stride, ir.Constant(stride.type, i))) for i in range(count)]


class TileRows(NamedTuple):
    """The rows of one factor of a tile."""

    data: Any
    """The typed pointer."""
    dtype: Any
    starts: list[Any]
    """The offset of each row."""


class Tile:
    """The code of a tile: an accumulator for each pair of a row of x and a row of w."""

    def __init__(self, b: Any, loading: Loading, x: TileRows, w: TileRows, k_size: Any) -> None:
        self._b, self._loading, self._x, self._w, self._k_size = b, loading, x, w, k_size
        self._zero = ir.Constant(ir.VectorType(F32, WIDTH), [0.0] * WIDTH)
        self._sums = [[cgutils.alloca_once_value(b, self._zero) for _ in w.starts] for _ in x.starts]

    def number(self, value: int) -> ir.Constant:
        """A constant of the type of offsets."""
        return ir.Constant(self._k_size.type, value)

    def add(self, first_k: Any, last_k: Any, ahead: int = 0, lines: int = 0) -> None:
        """Add the products of the inputs from `first_k` to `last_k`."""
        b, step = self._b, STEP_INPUTS
        length = b.sub(last_k, first_k)
        num_steps = b.sdiv(length, self.number(step))
        num_others = b.sub(num_steps, self.number(1)) if self._loading.reads_behind else num_steps
        with cgutils.for_range(b, num_others) as loop:
            k = b.add(first_k, b.mul(loop.index, self.number(step)))
            for line in range(lines if ahead else 0):
                self._ask_for(b.mul(self.number(ahead), b.add(self._k_size, k)), line)
            self._add_step(k, step)
        if self._loading.reads_behind:
            with b.if_then(b.icmp_signed(">", num_steps, self.number(0)), likely=True):
                self._add_step(b.add(first_k, b.mul(num_others, self.number(step))), step, is_last=True)
        rest = b.srem(length, self.number(step))
        with b.if_then(b.icmp_signed("!=", rest, self.number(0)), likely=False):
            self._add_step(b.sub(last_k, rest), LANES, is_last=True)

    def _ask_for(self, distance: Any, line: int) -> None:
        """Ask for a cache line of weights so many numbers from the first, and `line` lines from there."""
        further = self.number(line * LINE_BYTES * 8 // self._w.dtype.bitwidth)
        prefetch_at(self._b, self._w.data, self._b.add(self._b.add(self._w.starts[0], distance), further))

    def _add_step(self, k: Any, count: int, *, is_last: bool = False) -> None:
        b, loading = self._b, self._loading
        for part in range(NUM_PARTS if count == STEP_INPUTS else 1):
            step = Step(count, part, is_last)
            weights = [loading.load(b, self._w.data, self._w.dtype, b.add(start, k), step) for start in self._w.starts]
            for start, row_sums in zip(self._x.starts, self._sums, strict=True):
                a = loading.load(b, self._x.data, self._x.dtype, b.add(start, k), step)
                for weight, place in zip(weights, row_sums, strict=True):
                    b.store(vector_call(b, "fma", a, weight, b.load(place)), place)

    def _kept(self, data: Any) -> list[tuple[Any, Any]]:
        """Each accumulator with its place in memory."""
        places = [place for row in self._sums for place in row]
        kept = self._b.bitcast(data, self._zero.type.as_pointer())
        return [(place, self._b.gep(kept, [self.number(i)])) for i, place in enumerate(places)]

    def take(self, data: Any, is_first: Any) -> None:
        """Go on with the sums that were kept, or begin with zeros."""
        for place, kept in self._kept(data):
            value = self._b.load(kept)
            value.align = 4
            self._b.store(self._b.select(is_first, self._zero, value), place)

    def keep(self, data: Any) -> None:
        """Write the sums to a place from which `take` goes on."""
        for place, kept in self._kept(data):
            self._b.store(self._b.load(place), kept).align = 4

    def write(self, bias: Any, n: Any, out: Any, starts: list[Any]) -> None:
        """Fold the sums, add the biases from `n` on, write those of each row of x to `out` from its start on."""
        b = self._b
        for o, row_sums in zip(starts, self._sums, strict=True):
            for i, place in enumerate(row_sums):
                added = b.load(b.gep(bias, [b.add(n, self.number(i))]))
                total = b.fadd(fold_sum(b, b.load(place)), added)
                b.store(total, b.gep(out, [b.add(o, self.number(i))]))
