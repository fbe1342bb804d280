"""Which adapter each row of a step has, where the kernels of adapters read it (`quant.base.AdapterRows`)."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import torch

from engine.scheduling.adapters import NO_SLOT
from quant.base import AdapterRows
from quant.kernels.transfer import to_device

Integers = npt.NDArray[np.int64]


class StepRows:
    """The rows of one step at a time."""

    def __init__(self, device: torch.device) -> None:
        self.current = AdapterRows()
        """What the kernels of all layers read."""
        self._device = device
        self._key: tuple[list[int], list[int]] | None = None
        """What `current` was made of, and still is: slots and `query_start_loc`; None: no such step."""
        self._needed: AdapterRows | None = None
        """What `current` becomes in the last layer; None: it stays."""
        self._captured: torch.Tensor | None = None
        """The same for graphs, on the device: [2, rows of the largest graph] int64; None: there are none."""

    def begin(self, slots: list[int], query_start_loc: list[int], needed: list[int] | None) -> None:
        """Take in the slot of each sequence of a step. `needed` are the rows that layers see from `narrow` on."""
        key = slots, query_start_loc
        if key != self._key or needed is not None:
            slots_of_rows = np.repeat(slots, np.diff(query_start_loc))
            self.show(slots_of_rows)
            self._needed = None if needed is None else self._sorted(slots_of_rows[needed])
        self._key = key if needed is None else None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Rows and slots of the step that has begun, then those from `narrow` on, if there will be others."""
        steps = [self.current] if self._needed is None else [self.current, self._needed]
        return [tensor for step in steps for tensor in (step.rows, step.slots) if tensor is not None]

    def begin_without(self) -> None:
        """Take in a step of which no sequence has an adapter."""
        self.current.rows, self._key, self._needed = None, None, None

    def narrow(self) -> None:
        """Let the layers that follow see those rows of the step alone that `begin` was told."""
        if self._needed is not None:
            self.current.take(self._needed)

    @torch.inference_mode(False)
    def keep(self, max_rows: int) -> None:
        """Have the rows of steps of up to so many in one place on the device from now on, for graphs to read."""
        self._captured = torch.full((2, max_rows), NO_SLOT, dtype=torch.int64, device=self._device)
        self._captured[0] = torch.arange(max_rows)

    def select(self, num_rows: int) -> None:
        """Let a graph of so many rows, which is captured now, read those of the steps that it will compute."""
        assert self._captured is not None, "called before keep"
        self.current.rows, self.current.slots = self._captured[:, :num_rows]

    def show(self, slots: Integers) -> None:
        """Let layers see rows with these slots."""
        num_rows, captured = len(slots), self._captured
        found = self._sorted(slots)
        if captured is not None and num_rows <= captured.shape[1]:
            assert found.rows is not None and found.slots is not None
            captured[0, :num_rows], captured[1, :num_rows] = found.rows, found.slots
            captured[0, num_rows:], captured[1, num_rows:] = 0, NO_SLOT  # rows of padding
            found.rows, found.slots = captured[:, :num_rows]
        self.current.take(found)

    def _sorted(self, slots: Integers) -> AdapterRows:
        """Rows with these slots in the order of the slots."""
        order = np.argsort(slots, kind="stable")
        both = np.stack([order, slots[order]])
        bounds = [0, *np.flatnonzero(np.diff(both[1])) + 1, len(order)] if len(order) else []
        segments = [(int(both[1][first]), int(first), int(end)) for first, end in itertools.pairwise(bounds)]
        rows, slots_in_order = to_device(both, self._device)
        return AdapterRows(rows, slots_in_order, [segment for segment in segments if segment[0] >= 0])
