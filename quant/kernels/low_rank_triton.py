"""Adapters' changes in Triton: two launches for each place where matrices have a common input, whatever the adapters.

`shrink` multiplies the rows with their adapters' A, `expand` what that gives with B, and adds the result to the
matrices' own. Which rows have which adapter is data on the device: the launches depend on the number of rows alone, and
read nothing back. A program takes up to `BLOCK_ROWS` rows in the order of their adapters, and each adapter among them
in its turn, for which the other rows are zeros: so rows of one adapter share the reading of its numbers, and a row's
sums are in one order whatever rows are beside it.

The inputs of A are split over several programs, since there is little else to do at once. `expand` adds their sums in
the order of the inputs; no program adds to what another one wrote. All sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from quant.base import AdapterRows, LowRankShape, LowRankUpdate, RowGroups
from quant.kernels.launch import IS_INTERPRETED, launch
from quant.kernels.low_rank_torch import places_of_rows
from quant.kernels.skinny_triton import dot

BLOCK_ROWS = 16
"""Rows of a program: the fewest that `tl.dot` takes, and alike for any number of rows."""
BLOCK_INPUTS = 64
BLOCK_OUTPUTS = 64
BLOCK_RANKS = (16, 32)
"""Ranks of a program, of which `tl.dot` takes no fewer; larger ranks are several blocks of the last."""
SPLIT_INPUTS, MAX_SPLITS = 256, 16
"""Inputs that are worth a split, and splits whose sums are still little to add."""
NO_MORE = 2**31 - 1


@triton.jit
def _next_slot(slots, slot, NO_MORE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The smallest of `slots` above `slot`; NO_MORE: there is none."""
    return tl.min(tl.where(slots > slot, slots, NO_MORE), 0)


@triton.jit(do_not_specialize=["num_rows"])
def shrink_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [num_rows, num_inputs]
    a_ptr,  # [slots, PARTS, RANK, num_inputs]
    ranks_ptr,  # [slots, PARTS] int32
    rows_ptr,  # [num_rows] int64
    slots_ptr,  # [num_rows] int64
    out_ptr,  # [SPLITS, PARTS, num_rows, RANK] float32, by places among `rows_ptr`
    num_rows,
    num_inputs,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    NO_MORE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Sums over a split's inputs of A x, of the rows that have an adapter which changes the part."""
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part, first_rank = tl.program_id(1) % PARTS, tl.program_id(1) // PARTS * BLOCK_RANK
    split = tl.program_id(2)
    is_row = places < num_rows
    rows = tl.load(rows_ptr + places, mask=is_row, other=0)
    slots = tl.load(slots_ptr + places, mask=is_row, other=-1).to(tl.int32)
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    split_inputs = tl.cdiv(tl.cdiv(num_inputs, SPLITS), BLOCK_INPUTS) * BLOCK_INPUTS
    first = split * split_inputs
    last = tl.minimum(first + split_inputs, num_inputs)
    out = out_ptr + ((split * PARTS + part) * num_rows + places)[:, None].to(tl.int64) * RANK + ranks[None, :]
    slot = _next_slot(slots, -1, NO_MORE)
    while slot < NO_MORE:
        rank = tl.load(ranks_ptr + slot * PARTS + part)
        if rank > first_rank:
            is_own = is_row & (slots == slot)
            a = a_ptr + ((slot * PARTS + part) * RANK + ranks)[None, :].to(tl.int64) * num_inputs
            acc = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
            for start in range(first, last, BLOCK_INPUTS):
                inputs = start + tl.arange(0, BLOCK_INPUTS)
                is_input = inputs < last
                x = tl.load(
                    x_ptr + rows[:, None] * num_inputs + inputs[None, :],
                    mask=is_own[:, None] & is_input[None, :],
                    other=0.0,
                )
                mask = is_input[:, None] & (ranks < rank)[None, :]
                weight = tl.load(a + inputs[:, None], mask=mask, other=0.0)
                acc = dot(x, weight, acc, WIDEN)
            tl.store(out, acc, mask=is_own[:, None])
        slot = _next_slot(slots, slot, NO_MORE)


@triton.jit(do_not_specialize=["num_rows"])
def expand_kernel(  # type: ignore[no-untyped-def]
    sums_ptr,  # what `shrink_kernel` wrote
    b_ptr,  # [slots, num_outputs, RANK]
    ranks_ptr,  # [slots, PARTS] int32
    scalings_ptr,  # [slots, PARTS] float32
    rows_ptr,  # [num_rows] int64
    slots_ptr,  # [num_rows] int64
    tiles_ptr,  # [tiles, 3] int32: first output, number of outputs, part
    y_ptr,  # [num_rows, num_outputs]
    num_rows,
    num_outputs,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    NO_MORE: tl.constexpr,
):
    """y += scaling * B (A x), of the rows that have an adapter which changes the part."""
    tile = tiles_ptr + 3 * tl.program_id(0)
    outputs = tl.arange(0, BLOCK_OUTPUTS)
    is_output = outputs < tl.load(tile + 1)
    outputs = tl.load(tile) + outputs
    part = tl.load(tile + 2)
    places = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = places < num_rows
    rows = tl.load(rows_ptr + places, mask=is_row, other=0)
    slots = tl.load(slots_ptr + places, mask=is_row, other=-1).to(tl.int32)
    slot = _next_slot(slots, -1, NO_MORE)
    while slot < NO_MORE:
        rank = tl.load(ranks_ptr + slot * PARTS + part)
        if rank > 0:
            is_own = is_row & (slots == slot)
            b = b_ptr + (slot.to(tl.int64) * num_outputs + outputs)[None, :] * RANK
            scaling = tl.load(scalings_ptr + slot * PARTS + part)
            change = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
            for first in range(0, rank, BLOCK_RANK):
                ranks = first + tl.arange(0, BLOCK_RANK)
                shrunk = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
                for split in tl.static_range(SPLITS):
                    where = ((split * PARTS + part) * num_rows + places)[:, None].to(tl.int64) * RANK
                    shrunk += tl.load(sums_ptr + where + ranks[None, :], mask=is_own[:, None], other=0.0)
                mask = is_output[None, :] & (ranks < rank)[:, None]
                weight = tl.load(b + ranks[:, None], mask=mask, other=0.0).to(tl.float32)
                change = tl.dot(shrunk * scaling, weight, change, input_precision="ieee")
            y = y_ptr + rows[:, None] * num_outputs + outputs[None, :]
            mask = is_own[:, None] & is_output[None, :]
            total = tl.load(y, mask=mask, other=0.0).to(tl.float32) + change
            tl.store(y, total.to(y_ptr.dtype.element_ty), mask=mask)
        slot = _next_slot(slots, slot, NO_MORE)


class LowRankTriton:
    """The pools of A and B of all slots, and their launches."""

    is_host_driven = False

    @staticmethod
    def why_not(shape: LowRankShape) -> list[str]:
        return []

    def __init__(self, shape: LowRankShape, step: AdapterRows) -> None:
        self._shape, self._step = shape, step
        self._num_parts, self._n_size = len(shape.num_outputs), sum(shape.num_outputs)
        self._block_rank = next((count for count in BLOCK_RANKS if count >= shape.max_rank), BLOCK_RANKS[-1])
        self._rank = -(-shape.max_rank // self._block_rank) * self._block_rank
        self._splits = min(MAX_SPLITS, max(1, shape.num_inputs // SPLIT_INPUTS))
        pool: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        self._a = torch.zeros(shape.num_places, self._num_parts, self._rank, shape.num_inputs, **pool)
        self._b = torch.zeros(shape.num_places, self._n_size, self._rank, **pool)
        self._ranks = torch.zeros(shape.num_places, self._num_parts, dtype=torch.int32, device=shape.device)
        self._scalings = torch.zeros(shape.num_places, self._num_parts, device=shape.device)
        self._tiles = torch.tensor(_tiles(shape.num_outputs), dtype=torch.int32, device=shape.device)
        self.num_bytes = self._a.nbytes + self._b.nbytes

    @property
    def is_idle(self) -> bool:
        return self._step.rows is None

    def put(self, place: int, updates: Sequence[LowRankUpdate | None]) -> None:
        ranks = [0 if update is None else len(update.a) for update in updates]
        scalings = [0.0 if update is None else update.scaling for update in updates]
        self._ranks[place] = torch.tensor(ranks, dtype=torch.int32)
        self._scalings[place] = torch.tensor(scalings)
        first = 0
        for part, (update, size) in enumerate(zip(updates, self._shape.num_outputs, strict=True)):
            if update is not None:  # what lies beyond the rank is not read
                self._a[place, part, : ranks[part]] = update.a.to(self._a)
                self._b[place, first : first + size, : ranks[part]] = update.b.to(self._b)
            first += size

    def add_to(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups | None = None) -> None:
        rows, slots = self._step.rows, self._step.slots
        if rows is None or slots is None:
            return
        if groups is not None:
            slots = places_of_rows(self._step, groups, self._shape.num_matrices)
            rows = torch.arange(len(slots), device=slots.device)
        assert len(rows) == len(x), "a layer that sees other rows than the step's can't have adapters"
        num_rows, num_blocks = len(x), -(-len(x) // BLOCK_ROWS)
        num_parts, num_rank_blocks = self._num_parts, self._rank // self._block_rank
        sums = x.new_empty(self._splits, num_parts, num_rows, self._rank, dtype=torch.float32)
        sizes = {"PARTS": num_parts, "RANK": self._rank, "SPLITS": self._splits, "BLOCK_RANK": self._block_rank}
        launch(
            shrink_kernel,
            (num_blocks, num_parts * num_rank_blocks, self._splits),
            x.contiguous(),
            self._a,
            self._ranks,
            rows,
            slots,
            sums,
            num_rows,
            self._shape.num_inputs,
            **sizes,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_INPUTS=BLOCK_INPUTS,
            NO_MORE=NO_MORE,
            WIDEN=IS_INTERPRETED,
        )
        launch(
            expand_kernel,
            (len(self._tiles), num_blocks),
            sums,
            self._b,
            self._ranks,
            self._scalings,
            rows,
            slots,
            self._tiles,
            y,
            num_rows,
            self._n_size,
            **sizes,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_OUTPUTS=BLOCK_OUTPUTS,
            NO_MORE=NO_MORE,
        )


def _tiles(num_outputs: Sequence[int]) -> list[tuple[int, int, int]]:
    """First output, number of outputs and part of each tile."""
    tiles, start = [], 0
    for part, size in enumerate(num_outputs):
        blocks = range(0, size, BLOCK_OUTPUTS)
        tiles += [(start + first, min(BLOCK_OUTPUTS, size - first), part) for first in blocks]
        start += size
    return tiles
