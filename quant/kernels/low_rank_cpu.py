"""Adapters' changes on a CPU: float32 activations, changes as stored (bfloat16, float16, float32), float32 sums.

`shrink` multiplies a row with its adapter's A, `expand` what that gives with B, and adds the result to the matrix's
own. `expand_gated` does the same for gates and what they gate, and writes silu(gate) * other. A row meets its own
adapter alone, and every sum has its order: the tiles of the dense product (`dense_ops`) along the inputs, then the
ranks one after the other. So a row's bits do not depend on the rows or adapters beside it. Rows of one adapter share
the reading of its numbers, wherever they are in the step (`low_rank_ops`).

A slot's change is A [parts, rank, inputs], then B, tile by tile [tiles, rank, TILE]. What differs from step to step
stands in `AdapterRows`, whose arrays are parameters where calls are made again (`program_cpu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads, njit, prange

from quant.base import AdapterRows, LowRankShape, LowRankUpdate, RowGroups
from quant.kernels.arrays import FAST, call, flat_view, new_output, new_weight
from quant.kernels.low_rank_ops import QUAD, TILE, make_expand_tile, make_gated_tile, make_shrink_tile
from quant.kernels.simd import HAS_AVX512, LANES

TILE_ROWS = 4 if HAS_AVX512 else 2
"""Rows of the larger of two tiles; the other has one. More would not fit the registers."""
SHRINK_ROWS, EXPAND_ROWS = 16, 64
"""Rows of an item, which stay in the caches while A or B goes by."""
EXPAND_TILES = 16
"""Tiles of B of an item of several blocks of rows."""
MIN_PARALLEL_PRODUCTS = 40_000
"""Fewer multiplications than these are done by one thread: others would take as long to begin. Gates always have more
to do."""

_shrink_one, _shrink_some = make_shrink_tile(1), make_shrink_tile(TILE_ROWS)
_expand_one, _expand_some = make_expand_tile(1), make_expand_tile(TILE_ROWS)
_gated_one, _gated_some = make_gated_tile(1), make_gated_tile(TILE_ROWS)


@njit(inline="always")
def _group_end(slots, first, last):  # type: ignore[no-untyped-def]
    """The place after those from `first` on that have the same slot, and are no more than a tile's."""
    end = first + 1
    while end < min(last, first + TILE_ROWS) and slots[end] == slots[first]:
        end += 1
    return end


@njit(inline="always")
def _cut(num_rows, block_rows, num_tiles, max_tiles, num_threads):  # type: ignore[no-untyped-def]
    """How rows times tiles are cut: tiles of an item, items of a block of rows, all items.

    Every thread has an item; within it an adapter's numbers are read one after the other. An item of several blocks has
    `max_tiles` at most.
    """
    num_blocks = (num_rows + block_rows - 1) // block_rows
    num_items = max(1, (num_threads + num_blocks - 1) // max(1, num_blocks))
    item_tiles = (num_tiles + num_items - 1) // num_items
    if num_blocks > 1:
        item_tiles = min(max_tiles, item_tiles)
    block_items = (num_tiles + item_tiles - 1) // item_tiles
    return item_tiles, block_items, num_blocks * block_items


@njit(inline="always")
def _shrink_item(item, block_items, item_quads, x, step, zeros, out, sizes):  # type: ignore[no-untyped-def]
    width, num_parts, k_size = sizes
    numbers, slot_size, scalings, ranks, rows, slots = step
    place, first = item // block_items * SHRINK_ROWS, item % block_items * item_quads
    last = min(rows.size, place + SHRINK_ROWS)
    while place < last:
        slot, end = slots[place], _group_end(slots, place, last)
        rank = ranks[slot] if slot >= 0 else 0
        for quad in range(first, min(first + item_quads, rank * num_parts // QUAD)):
            column = quad * QUAD
            a0, scaling = slot * slot_size + column * k_size, scalings[slot * num_parts + column // rank]
            if end - place > 1:
                _shrink_some(x, rows, place, end, numbers, a0, k_size, zeros, scaling, out, width, column)
            else:
                _shrink_one(x, rows, place, end, numbers, a0, k_size, zeros, scaling, out, width, column)
        place = end


@njit(parallel=True, **FAST)
def shrink(x, numbers, slot_size, scalings, ranks, rows, slots, zeros, out, sizes, num_threads):  # type: ignore[no-untyped-def]
    """out[row, rank of all parts] = scaling * A x.

    `numbers` has the changes of all slots, `slot_size` each; `ranks` that of each slot, `scalings` [slots, parts]; rows
    and slots as in `AdapterRows`; `sizes`: numbers of a row of out, parts, inputs. x, scalings and out float32.
    """
    num_quads = sizes[0] // QUAD
    item_quads, block_items, num_items = _cut(rows.size, SHRINK_ROWS, num_quads, num_quads, num_threads)
    step = numbers, slot_size, scalings, ranks, rows, slots
    if rows.size * sizes[0] * sizes[2] < MIN_PARALLEL_PRODUCTS:
        for item in range(num_items):
            _shrink_item(item, block_items, item_quads, x, step, zeros, out, sizes)
    else:
        for item in prange(num_items):
            _shrink_item(item, block_items, item_quads, x, step, zeros, out, sizes)


@njit(inline="always")
def _expand_item(item, block_items, item_tiles, t, step, out, sizes):  # type: ignore[no-untyped-def]
    width, _, n_size = sizes
    numbers, slot_size, b_start, tiles, ranks, rows, slots = step
    place, first_tile = item // block_items * EXPAND_ROWS, item % block_items * item_tiles
    last, last_tile = min(rows.size, place + EXPAND_ROWS), min(tiles.shape[0], first_tile + item_tiles)
    while place < last:
        slot, end = slots[place], _group_end(slots, place, last)
        if slot >= 0 and ranks[slot] > 0:
            rank = ranks[slot]
            for tile in range(first_tile, last_tile):
                first, count, column = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2] * rank
                b0 = slot * slot_size + b_start + tile * rank * TILE
                if end - place > 1:
                    _expand_some(t, rows, place, end, width, column, rank, numbers, b0, out, n_size, first, count)
                else:
                    _expand_one(t, rows, place, end, width, column, rank, numbers, b0, out, n_size, first, count)
        place = end


@njit(parallel=True, **FAST)
def expand(t, numbers, slot_size, b_start, tiles, ranks, rows, slots, out, sizes, num_threads):  # type: ignore[no-untyped-def]
    """out[row, n] += B t, float32.

    `numbers`, ranks, rows and slots as in `shrink`; a slot's B begins at `b_start`; `tiles` [*, 3] has the first
    output, the number of outputs and the part of each tile; `sizes`: numbers of a row of t, parts, numbers of a row of
    out.
    """
    item_tiles, block_items, num_items = _cut(rows.size, EXPAND_ROWS, tiles.shape[0], EXPAND_TILES, num_threads)
    step = numbers, slot_size, b_start, tiles, ranks, rows, slots
    if rows.size * (sizes[0] // sizes[1]) * sizes[2] < MIN_PARALLEL_PRODUCTS:
        for item in range(num_items):
            _expand_item(item, block_items, item_tiles, t, step, out, sizes)
    else:
        for item in prange(num_items):
            _expand_item(item, block_items, item_tiles, t, step, out, sizes)


@njit(inline="always")
def _gated_item(item, block_items, item_tiles, t, step, y, out, sizes):  # type: ignore[no-untyped-def]
    width, n_size = sizes
    numbers, slot_size, b_start, ranks, rows, slots = step
    place, first_tile = item // block_items * EXPAND_ROWS, item % block_items * item_tiles
    last, last_tile = min(rows.size, place + EXPAND_ROWS), min(n_size // TILE, first_tile + item_tiles)
    while place < last:
        slot, end = slots[place], _group_end(slots, place, last)
        rank = ranks[slot] if slot >= 0 else 0
        apart = rank * n_size
        for tile in range(first_tile, last_tile):
            first, b0 = tile * TILE, slot * slot_size + b_start + tile * rank * TILE
            if end - place > 1:
                _gated_some(t, rows, place, end, width, rank, numbers, b0, apart, y, out, n_size, first)
            else:
                _gated_one(t, rows, place, end, width, rank, numbers, b0, apart, y, out, n_size, first)
        place = end


@njit(parallel=True, **FAST)
def expand_gated(t, numbers, slot_size, b_start, ranks, rows, slots, y, out, sizes, num_threads):  # type: ignore[no-untyped-def]
    """out[row, n] = silu(gate) * other, where y[row] + B t has the gates before as many others; all float32.

    What is not said here is as in `expand`; `sizes`: numbers of a row of t and of out.
    """
    item_tiles, block_items, num_items = _cut(rows.size, EXPAND_ROWS, sizes[1] // TILE, EXPAND_TILES, num_threads)
    step = numbers, slot_size, b_start, ranks, rows, slots
    for item in prange(num_items):
        _gated_item(item, block_items, item_tiles, t, step, y, out, sizes)


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
        size = shape.num_outputs[0]
        self.num_gates = size if shape.is_gated and size % TILE == 0 else 0
        self._b_start = self._width * shape.num_inputs
        self._slot_size = self._b_start + len(self._tiles) * max_rank * TILE
        memory = new_weight(shape.num_places * self._slot_size * shape.dtype.itemsize)
        self._numbers = torch.from_numpy(memory).view(shape.dtype).view(shape.num_places, -1)
        self._flat_numbers = flat_view(self._numbers)
        self._ranks = np.zeros(shape.num_places, np.int64)
        self._scalings = np.zeros(shape.num_places * self._num_parts, np.float32)
        self._zeros = np.zeros(QUAD, np.float32)
        self._num_threads = get_num_threads()
        self.num_bytes = memory.nbytes

    @property
    def is_idle(self) -> bool:
        return self._step.rows is None

    def put(self, place: int, updates: Sequence[LowRankUpdate | None]) -> None:
        ranks = [0 if update is None else len(update.a) for update in updates]
        self._ranks[place] = rank = _filled(max(ranks), QUAD)
        if not rank:
            return
        a, b = self._numbers[place].split([self._b_start, self._slot_size - self._b_start])
        a = a[: self._num_parts * rank * self._shape.num_inputs].view(self._num_parts, rank, -1)
        b = b[: len(self._tiles) * rank * TILE].view(-1, rank, TILE)
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

    def _shrink(self, x: torch.Tensor, step: tuple[Any, ...]) -> npt.NDArray[np.float32]:
        """A x, times the scaling, of all parts: flat [rows * width]. `step`: ranks of the slots, rows, their slots."""
        assert len(step[1]) == len(x), "a layer that sees other rows than the step's can't have adapters"
        _, t = new_output(len(x), self._width)
        numbers, sizes = (self._flat_numbers, self._slot_size), (self._width, self._num_parts, self._shape.num_inputs)
        call(shrink, flat_view(x), *numbers, self._scalings, *step, self._zeros, t, sizes, self._num_threads)
        return t

    def add_to(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups | None = None) -> None:
        rows, slots = self._step.rows, self._step.slots
        if rows is None or slots is None:
            return
        if groups is not None:
            rows, slots = self._places(rows, slots, groups)
        step = self._ranks, rows.numpy(), slots.numpy()
        t, numbers = self._shrink(x, step), (self._flat_numbers, self._slot_size, self._b_start)
        sizes = self._width, self._num_parts, self._n_size
        call(expand, t, *numbers, self._tiles, *step, flat_view(y), sizes, self._num_threads)

    def gated(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert self._step.rows is not None and self._step.slots is not None, "no row has an adapter"
        assert self.num_gates
        step = self._ranks, self._step.rows.numpy(), self._step.slots.numpy()
        t, numbers = self._shrink(x, step), (self._flat_numbers, self._slot_size, self._b_start)
        result, out = new_output(len(x), self.num_gates)
        sizes = self._width, self.num_gates
        call(expand_gated, t, *numbers, *step, flat_view(y), out, sizes, self._num_threads)
        return result


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
