"""Adapters' changes on a CPU: float32 activations, changes as stored (bfloat16, float16, float32), float32 sums.

`shrink` multiplies a row with its adapter's A, `expand` what that gives with B, and adds the result to the matrix's
own. A row meets its own adapter alone, and every sum has its order: the tiles of the dense product (`dense_ops`) along
the inputs, then the ranks one after the other. So a row's bits do not depend on the rows or adapters beside it. Rows of
one adapter come one after the other, and share the reading of its numbers.

What differs from step to step stands in `AdapterRows`; a step of few rows finds it where the last one did, so that its
calls can be made again (`program_cpu`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, prange

from quant.base import AdapterRows, LowRankShape, LowRankUpdate, RowGroups
from quant.kernels.arrays import FAST, call, flat_view, new_output
from quant.kernels.dense_ops import make_tile
from quant.kernels.simd import HAS_AVX512, LANES, add, fma, load16, load_one, splat16, store, zeros16

QUAD = 4
"""Ranks of an item of `shrink`. An adapter's rank is filled up with zeros to a multiple of it."""
TILE = 16
"""Outputs whose numbers lie together in B: rank after rank."""
ITEM_TILES = 16
"""Tiles of an item of `expand`."""
MAX_BLOCK_ROWS = 64
"""Rows of an item."""

_one_row = make_tile(1, QUAD, ahead=0)
_GROUP = 4 if HAS_AVX512 else 2
_group_of_rows = make_tile(_GROUP, QUAD, ahead=0)


@njit(inline="always")
def _segment_end(slots, first, last):  # type: ignore[no-untyped-def]
    """The place after those from `first` on that have the same slot."""
    end = first + 1
    while end < last and slots[end] == slots[first]:
        end += 1
    return end


@njit(inline="always")
def _add_tile(out, o0, total, count, rest, rest0):  # type: ignore[no-untyped-def]
    """out[o0 + n] += total[n] for the first `count` lanes; `rest` has place for a tile that is not full."""
    if count == TILE:
        store(out, o0, add(load16(out, o0), total))
    else:
        store(rest, rest0, total)
        for n in range(count):
            out[o0 + n] += rest[rest0 + n]


@njit(parallel=True, **FAST)
def shrink(x, a, slot_size, scalings, ranks, rows, slots, zeros, out, width, num_parts, k_size):  # type: ignore[no-untyped-def]
    """out[row, rank of all parts] = scaling * A x."""
    num_quads = width // QUAD
    num_blocks = (rows.size + MAX_BLOCK_ROWS - 1) // MAX_BLOCK_ROWS
    for item in prange(num_blocks * num_quads):
        place, column = item // num_quads * MAX_BLOCK_ROWS, item % num_quads * QUAD
        last = min(rows.size, place + MAX_BLOCK_ROWS)
        while place < last:
            slot, end = slots[place], _segment_end(slots, place, last)
            rank = ranks[slot] if slot >= 0 else 0
            if column < rank * num_parts:
                w0 = slot * slot_size + column * k_size
                scaling = scalings[slot * num_parts + column // rank]
                while place < end:
                    row, count = rows[place], 1
                    if place + _GROUP <= end and rows[place + _GROUP - 1] == row + _GROUP - 1:
                        count = _GROUP
                        _group_of_rows(x, row * k_size, a, w0, k_size, zeros, 0, out, row * width + column, width)
                    else:
                        _one_row(x, row * k_size, a, w0, k_size, zeros, 0, out, row * width + column, width)
                    for r in range(row, row + count):
                        for c in range(r * width + column, r * width + column + QUAD):
                            out[c] *= scaling
                    place += count
            place = end


@njit(parallel=True, **FAST)
def expand(t, b, slot_size, tiles, ranks, rows, slots, rest, out, width, num_parts, n_size):  # type: ignore[no-untyped-def]
    """out[row, n] += B t; `tiles` has the first output, the number of outputs and the part of each tile."""
    num_tiles = tiles.shape[0]
    num_chunks = (num_tiles + ITEM_TILES - 1) // ITEM_TILES
    num_blocks = (rows.size + MAX_BLOCK_ROWS - 1) // MAX_BLOCK_ROWS
    for item in prange(num_blocks * num_chunks):
        place, chunk = item // num_chunks * MAX_BLOCK_ROWS, item % num_chunks * ITEM_TILES
        last = min(rows.size, place + MAX_BLOCK_ROWS)
        while place < last:
            slot, end = slots[place], _segment_end(slots, place, last)
            rank = ranks[slot] if slot >= 0 else 0
            if rank > 0:
                for tile in range(chunk, min(num_tiles, chunk + ITEM_TILES)):
                    first, count, part = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
                    b0, i = slot * slot_size + tile * rank * TILE, place
                    while i + 4 <= end:  # widening B takes longer than multiplying by it
                        a0, a1, a2, a3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
                        s0, s1, s2, s3 = zeros16(), zeros16(), zeros16(), zeros16()
                        for r in range(rank):
                            weight, t0 = load16(b, b0 + r * TILE), part * rank + r
                            s0 = fma(splat16(load_one(t, a0 * width + t0)), weight, s0)
                            s1 = fma(splat16(load_one(t, a1 * width + t0)), weight, s1)
                            s2 = fma(splat16(load_one(t, a2 * width + t0)), weight, s2)
                            s3 = fma(splat16(load_one(t, a3 * width + t0)), weight, s3)
                        _add_tile(out, a0 * n_size + first, s0, count, rest, (a0 * num_parts + part) * TILE)
                        _add_tile(out, a1 * n_size + first, s1, count, rest, (a1 * num_parts + part) * TILE)
                        _add_tile(out, a2 * n_size + first, s2, count, rest, (a2 * num_parts + part) * TILE)
                        _add_tile(out, a3 * n_size + first, s3, count, rest, (a3 * num_parts + part) * TILE)
                        i += 4
                    while i < end:
                        a0, s0 = rows[i], zeros16()
                        for r in range(rank):
                            t0 = a0 * width + part * rank + r
                            s0 = fma(splat16(load_one(t, t0)), load16(b, b0 + r * TILE), s0)
                        _add_tile(out, a0 * n_size + first, s0, count, rest, (a0 * num_parts + part) * TILE)
                        i += 1
            place = end


@njit(**FAST)
def _find_places(rows, slots, sources, matrices, num_matrices, scratch, own_rows, places):  # type: ignore[no-untyped-def]
    """The place of the change of each row of groups, beside the row's own number; -1: it has none."""
    for i in range(len(rows)):
        scratch[rows[i]] = slots[i]
    for row in range(len(sources)):
        slot = scratch[sources[row]]
        own_rows[row], places[row] = row, slot * num_matrices + matrices[row] if slot >= 0 else -1


class LowRankCpu:
    """The pools of A and B of all slots, and their calls."""

    is_host_driven = False

    @staticmethod
    def why_not(shape: LowRankShape) -> list[str]:
        if shape.num_inputs % LANES:
            return [f"the CPU kernel needs input sizes that are a multiple of {LANES}, not {shape.num_inputs}"]
        return []

    def __init__(self, shape: LowRankShape, step: AdapterRows) -> None:
        self._shape, self._step = shape, step
        self._num_parts, max_rank = len(shape.num_outputs), _filled(shape.max_rank, QUAD)
        self._width = self._num_parts * max_rank
        self._tiles = np.array(_tiles(shape.num_outputs), np.int64)
        self._n_size = sum(shape.num_outputs)
        # Nothing is written to the memory of slots that were never used, so it is not taken.
        self._a = torch.zeros(shape.num_places, self._width * shape.num_inputs, dtype=shape.dtype)
        self._b = torch.zeros(shape.num_places, len(self._tiles) * max_rank * TILE, dtype=shape.dtype)
        self._flat_a, self._flat_b = flat_view(self._a), flat_view(self._b)
        self._ranks = np.zeros(shape.num_places, np.int64)
        self._scalings = np.zeros(shape.num_places * self._num_parts, np.float32)
        self._zeros = np.zeros(QUAD, np.float32)
        self.num_bytes = self._a.nbytes + self._b.nbytes

    @property
    def is_idle(self) -> bool:
        return self._step.rows is None

    def put(self, place: int, updates: Sequence[LowRankUpdate | None]) -> None:
        ranks = [0 if update is None else len(update.a) for update in updates]
        self._ranks[place] = rank = _filled(max(ranks), QUAD)
        if not rank:
            return
        a = self._a[place, : self._num_parts * rank * self._shape.num_inputs].view(self._num_parts, rank, -1)
        b = self._b[place, : len(self._tiles) * rank * TILE].view(-1, rank, TILE)
        a.zero_()
        b.zero_()
        first = 0
        for part, (update, size) in enumerate(zip(updates, self._shape.num_outputs, strict=True)):
            num_tiles = -(-size // TILE)
            if update is not None:
                a[part, : ranks[part]] = update.a
                filled = torch.zeros(num_tiles * TILE, ranks[part], dtype=b.dtype)
                filled[:size] = update.b
                b[first : first + num_tiles, : ranks[part]] = filled.view(num_tiles, TILE, -1).transpose(1, 2)
                self._scalings[place * self._num_parts + part] = update.scaling
            first += num_tiles

    def _places(self, rows: torch.Tensor, slots: torch.Tensor, groups: RowGroups) -> tuple[torch.Tensor, torch.Tensor]:
        """What `AdapterRows` has for the step's rows, for those of groups. Rows of one expert are neighbours."""
        sources, matrices = groups.sources.numpy(), groups.matrices.numpy()
        scratch, own_rows, places = _integers(len(rows)), _integers(len(sources)), _integers(len(sources))
        found = scratch.numpy(), own_rows.numpy(), places.numpy()
        call(_find_places, rows.numpy(), slots.numpy(), sources, matrices, self._shape.num_matrices, *found)
        return own_rows, places

    def add_to(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups | None = None) -> None:
        rows, slots = self._step.rows, self._step.slots
        if rows is None or slots is None:
            return
        if groups is not None:
            rows, slots = self._places(rows, slots, groups)
        assert len(rows) == len(x), "a layer that sees other rows than the step's can't have adapters"
        _, t = new_output(len(x), self._width)
        _, rest = new_output(len(x), self._num_parts * TILE)  # outputs of each part that fill no tile
        places = self._ranks, rows.numpy(), slots.numpy()
        a_size, b_size = self._a.shape[1], self._b.shape[1]
        sizes, k_size = (self._width, self._num_parts), self._shape.num_inputs
        call(shrink, flat_view(x), self._flat_a, a_size, self._scalings, *places, self._zeros, t, *sizes, k_size)
        call(expand, t, self._flat_b, b_size, self._tiles, *places, rest, flat_view(y), *sizes, self._n_size)


def _integers(count: int) -> torch.Tensor:
    """An uninitialised tensor [count] int64."""
    return new_output(count, 2)[0].view(-1).view(torch.int64)


def _filled(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _tiles(num_outputs: Sequence[int]) -> list[tuple[int, int, int]]:
    """First output, number of outputs and part of each tile."""
    tiles, start = [], 0
    for part, size in enumerate(num_outputs):
        tiles += [(start + first, min(TILE, size - first), part) for first in range(0, size, TILE)]
        start += size
    return tiles
