"""Adapters' changes in plain torch: the reference implementation, which also runs on every device without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant.base import AdapterRows, LowRankShape, LowRankUpdate


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
        self._scalings = [[0.0] * num_parts for _ in range(shape.num_slots)]
        self._ranks = [[0] * num_parts for _ in range(shape.num_slots)]
        self.num_bytes = self._a.nbytes + sum(b.nbytes for b in self._b)

    def _zeros(self, *size: int) -> torch.Tensor:
        shape = self._shape
        return torch.zeros(shape.num_slots, *size, dtype=shape.dtype, device=shape.device)

    def put(self, slot: int, updates: Sequence[LowRankUpdate | None]) -> None:
        for part, update in enumerate(updates):
            self._ranks[slot][part] = rank = 0 if update is None else len(update.a)
            if update is not None:
                self._a[slot, part, :rank].copy_(update.a)
                self._b[part][slot, :, :rank].copy_(update.b)
                self._scalings[slot][part] = update.scaling

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        if self._step.rows is None:
            return
        assert len(self._step.rows) == len(x), "a layer that sees other rows than the step's can't have adapters"
        for slot, start, stop in self._step.segments:
            rows = self._step.rows[start:stop]
            inputs, first = x[rows].to(torch.float32), 0
            for part, size in enumerate(self._shape.num_outputs):
                if rank := self._ranks[slot][part]:
                    a, b = self._a[slot, part, :rank], self._b[part][slot, :, :rank]
                    change = inputs @ a.to(torch.float32).T * self._scalings[slot][part] @ b.to(torch.float32).T
                    outputs = y[:, first : first + size]
                    outputs[rows] = (outputs[rows].to(torch.float32) + change).to(y.dtype)
                first += size
