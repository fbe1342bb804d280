"""Adapters' changes in plain torch: the reference implementation, which also runs on every device without a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from quant.base import AdapterRows, LowRankShape, LowRankUpdate, RowGroups


def places_of_rows(step: AdapterRows, groups: RowGroups, num_matrices: int) -> torch.Tensor:
    """The place of the change of each row of groups, [num_rows] int64; -1: it has none. Reads nothing on the host."""
    assert step.rows is not None and step.slots is not None
    # Rows of padding may be there twice in a graph, with and without a slot.
    slots = torch.full_like(step.slots, -1).scatter_reduce_(0, step.rows, step.slots, "amax")[groups.sources]
    return torch.where(slots < 0, -1, slots * num_matrices + groups.matrices)


class LowRankTorch:
    """Segment by segment, in float32; a step takes some launches for each adapter that it has."""

    is_host_driven = True

    @staticmethod
    def why_not(shape: LowRankShape) -> list[str]:
        return []

    def __init__(self, shape: LowRankShape, step: AdapterRows) -> None:
        self._shape, self._step = shape, step
        num_parts = len(shape.num_outputs)
        self._a = self._zeros(num_parts, shape.max_rank, shape.num_inputs)
        self._b = [self._zeros(size, shape.max_rank) for size in shape.num_outputs]
        self._scalings = [[0.0] * num_parts for _ in range(shape.num_places)]
        self._ranks = [[0] * num_parts for _ in range(shape.num_places)]
        self.num_bytes = self._a.nbytes + sum(b.nbytes for b in self._b)

    def _zeros(self, *size: int) -> torch.Tensor:
        shape = self._shape
        return torch.zeros(shape.num_places, *size, dtype=shape.dtype, device=shape.device)

    @property
    def is_idle(self) -> bool:
        return self._step.rows is None

    def put(self, place: int, updates: Sequence[LowRankUpdate | None]) -> None:
        for part, update in enumerate(updates):
            self._ranks[place][part] = rank = 0 if update is None else len(update.a)
            if update is not None:
                self._a[place, part, :rank].copy_(update.a)
                self._b[part][place, :, :rank].copy_(update.b)
                self._scalings[place][part] = update.scaling

    def _rows_by_place(self, groups: RowGroups | None) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows that have a change, with the place of it."""
        assert self._step.rows is not None
        if groups is None:
            for slot, start, stop in self._step.segments:
                yield slot, self._step.rows[start:stop]
            return
        places = places_of_rows(self._step, groups, self._shape.num_matrices)
        for place in places.unique().tolist():
            if place >= 0:
                yield place, (places == place).nonzero().flatten()

    def add_to(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups | None = None) -> None:
        if self._step.rows is None:
            return
        num_rows = len(self._step.rows if groups is None else groups.sources)
        assert num_rows == len(x), "a layer that sees other rows than the step's can't have adapters"
        for place, rows in self._rows_by_place(groups):
            inputs, first = x[rows].to(torch.float32), 0
            for part, size in enumerate(self._shape.num_outputs):
                if rank := self._ranks[place][part]:
                    a, b = self._a[place, part, :rank], self._b[part][place, :, :rank]
                    change = inputs @ a.to(torch.float32).T * self._scalings[place][part] @ b.to(torch.float32).T
                    outputs = y[:, first : first + size]
                    outputs[rows] = (outputs[rows].to(torch.float32) + change).to(y.dtype)
                first += size
