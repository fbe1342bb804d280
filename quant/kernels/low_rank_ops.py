"""Register tiles of adapters' changes: rows that have the same adapter, wherever they are, times a part of A or of B.

Rows are given as a list of their numbers. A tile takes those from `place` of it on, before `last`. Where these are too
few, it computes the last one again. `shrink` writes that a second time, the same numbers, before any row is scaled; the
others skip it. Rows of activations, of t and of results are float32, A and B are as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.dense_ops import FLOATS, Tile, TileRows, spaced
from quant.kernels.gates_ops import gated_of
from quant.kernels.simd import F32, I32, array_data, lanes_at, spread, vector_call

QUAD = 4
"""Ranks of a tile of A. An adapter's rank is filled up with zeros to a multiple of it."""
TILE = 16
"""Outputs of a tile of B. Their numbers lie together, rank after rank."""
LINES_AHEAD = 2
"""Lines of the next tile of A that a step of one asks for: all, where the numbers have 16 bits."""
FLOATS16 = ir.VectorType(F32, TILE)


class _Rows:
    """The rows of a tile."""

    def __init__(self, builder: Any, rows: Any, place: Any, last: Any, count: int) -> None:
        """`rows` is the pointer to the list."""
        self._builder, self._last = builder, last
        self._places = spaced(builder, place, ir.Constant(place.type, 1), count)
        end = builder.sub(last, ir.Constant(last.type, 1))
        places = [builder.select(builder.icmp_signed("<", at, last), at, end) for at in self._places]
        self._numbers = [builder.load(builder.gep(rows, [at])) for at in places]

    def starts(self, width: Any, column: Any) -> list[Any]:
        """The offset of a column of each row, in a matrix of such a width."""
        return [self._builder.add(self._builder.mul(number, width), column) for number in self._numbers]

    def if_own(self, index: int) -> Any:
        """A block for one of the rows, unless it is another one computed again."""
        is_own = self._builder.icmp_signed("<", self._places[index], self._last)
        return self._builder.if_then(is_own, likely=True)


class _Factors(NamedTuple):
    """A tile of B, and what it is multiplied with."""

    data: Any
    """The typed pointer to B."""
    dtype: Any
    first: Any
    """Where the tile begins."""
    starts: list[Any]
    """Where each row's numbers begin in t."""


def make_shrink_tile(count: int) -> Any:
    """`count` rows times `QUAD` rows of A, as a Numba intrinsic.

    x [*, k_size]; A's first row is a[a0 ..]. The products, times `scaling`, go to out [*, width], from `column` on.
    """

    @intrinsic
    def shrink_tile(typing_context, x, rows, place, last, a, a0, k_size, zeros, scaling, out, width, column):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x_data, list_data, a_data, zeros_data, out_data = (
                array_data(context, builder, signature, args, i) for i in (0, 1, 4, 7, 9)
            )
            place, last, a0, k_size, scaling, width, column = (args[i] for i in (2, 3, 5, 6, 8, 10, 11))
            none, one = (ir.Constant(k_size.type, number) for number in (0, 1))
            tile_rows = _Rows(builder, list_data, place, last, count)
            x_rows = TileRows(x_data, signature.args[0].dtype, tile_rows.starts(k_size, none))
            a_rows = TileRows(a_data, signature.args[4].dtype, spaced(builder, a0, k_size, QUAD))
            body = Tile(builder, FLOATS, x_rows, a_rows, k_size)
            body.add(none, k_size, QUAD, LINES_AHEAD)
            starts = tile_rows.starts(width, column)
            body.write(zeros_data, none, out_data, starts)  # all of them, before the first is scaled
            for index, start in enumerate(starts):
                with tile_rows.if_own(index):
                    for at in spaced(builder, start, one, QUAD):
                        target = builder.gep(out_data, [at])
                        builder.store(builder.fmul(builder.load(target), scaling), target)
            return context.get_dummy_value()

        at = types.intp
        return types.none(x, rows, at, at, a, at, at, zeros, types.float32, out, at, at), codegen

    return shrink_tile


def make_expand_tile(count: int) -> Any:
    """Add to `count` rows of out [*, n_size] what a tile of B makes of those of t [*, width], as a Numba intrinsic.

    `rank` numbers of t are read from `column` on. The tile is b[b0 ..], and has `size` outputs, from `first` on.
    """

    @intrinsic
    def expand_tile(  # type: ignore[no-untyped-def]
        typing_context, t, rows, place, last, width, column, rank, b, b0, out, n_size, first, size
    ):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            t_data, list_data, b_data, out_data = (
                array_data(context, builder, signature, args, i) for i in (0, 1, 7, 9)
            )
            place, last, width, column, rank, b0 = (args[i] for i in (2, 3, 4, 5, 6, 8))
            n_size, first, size = (args[i] for i in (10, 11, 12))
            tile_rows = _Rows(builder, list_data, place, last, count)
            factors = _Factors(b_data, signature.args[7].dtype, b0, tile_rows.starts(width, column))
            totals = _expand(builder, t_data, [factors], rank)
            for index, ((total,), start) in enumerate(zip(totals, tile_rows.starts(n_size, first), strict=True)):
                with tile_rows.if_own(index):
                    _add_lanes(builder, builder.gep(out_data, [start]), total, size)
            return context.get_dummy_value()

        at = types.intp
        return types.none(t, rows, at, at, at, at, at, b, at, out, at, at, at), codegen

    return expand_tile


def make_gated_tile(count: int) -> Any:
    """As `make_expand_tile`, of a tile of gates and one of what they gate, as a Numba intrinsic.

    y [*, 2 * n_size] + B t is the product that has gates from `first` on; out [*, n_size] gets silu(gates) * others.
    The others' numbers begin `rank` behind the gates' in t, and `apart` behind in b.
    """

    @intrinsic
    def gated_tile(  # type: ignore[no-untyped-def]
        typing_context, t, rows, place, last, width, rank, b, b0, apart, y, out, n_size, first
    ):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            t_data, list_data, b_data, y_data, out_data = (
                array_data(context, builder, signature, args, i) for i in (0, 1, 6, 9, 10)
            )
            place, last, width, rank, b0, apart, n_size, first = (args[i] for i in (2, 3, 4, 5, 7, 8, 11, 12))
            tile_rows, dtype = _Rows(builder, list_data, place, last, count), signature.args[6].dtype
            none = ir.Constant(rank.type, 0)
            gates = _Factors(b_data, dtype, b0, tile_rows.starts(width, none))
            others = _Factors(b_data, dtype, builder.add(b0, apart), tile_rows.starts(width, rank))
            changes = _expand(builder, t_data, [gates, others], rank)
            y_size = builder.add(n_size, n_size)
            y_starts = [tile_rows.starts(y_size, column) for column in (first, builder.add(n_size, first))]
            starts = zip(*y_starts, tile_rows.starts(n_size, first), strict=True)
            for index, (row_changes, (*y_places, target)) in enumerate(zip(changes, starts, strict=True)):
                with tile_rows.if_own(index):
                    gate, other = (
                        builder.fadd(lanes_at(builder, y_data, types.float32, at, TILE, TILE), change)
                        for at, change in zip(y_places, row_changes, strict=True)
                    )
                    place = builder.bitcast(builder.gep(out_data, [target]), FLOATS16.as_pointer())
                    builder.store(gated_of(builder, gate, other), place).align = 4
            return context.get_dummy_value()

        at = types.intp
        return types.none(t, rows, at, at, at, at, b, at, at, y, out, at, at), codegen

    return gated_tile


def _expand(builder: Any, t: Any, tiles: Sequence[_Factors], rank: Any) -> list[list[Any]]:
    """The sums of B t of each row for each of several tiles, [rows][tiles]; the ranks are added in order."""
    zero = ir.Constant(FLOATS16, [0.0] * TILE)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in tiles] for _ in tiles[0].starts]
    with cgutils.for_range(builder, rank) as loop:
        offset = builder.mul(loop.index, ir.Constant(rank.type, TILE))
        for part, tile in enumerate(tiles):
            weights = lanes_at(builder, tile.data, tile.dtype, builder.add(tile.first, offset), TILE, TILE)
            for row_sums, start in zip(sums, tile.starts, strict=True):
                number = spread(builder, builder.load(builder.gep(t, [builder.add(start, loop.index)])), TILE)
                total = vector_call(builder, "fma", number, weights, builder.load(row_sums[part]))
                builder.store(total, row_sums[part])
    return [[builder.load(total) for total in row_sums] for row_sums in sums]


def _add_lanes(builder: Any, target: Any, total: Any, size: Any) -> None:
    """Add the first `size` lanes to what lies at a pointer to floats."""
    place = builder.bitcast(target, FLOATS16.as_pointer())
    with builder.if_else(builder.icmp_signed("==", size, ir.Constant(size.type, TILE)), likely=True) as (whole, cut):
        with whole:
            before = builder.load(place)
            before.align = 4
            builder.store(builder.fadd(before, total), place).align = 4
        with cut, cgutils.for_range(builder, size) as loop:
            one = builder.gep(target, [loop.index])
            added = builder.extract_element(total, builder.trunc(loop.index, I32))
            builder.store(builder.fadd(builder.load(one), added), one)
