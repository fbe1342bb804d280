"""A step's numbers where the kernels read them: one array, filled once a step, and one copy of it to the device.

Every list has a section of the array, whose place stays while the section is large enough: sections grow by doubling
and never shrink. The tensors of a step are views of their sections. On a CPU these are the host's own array, and
nothing is copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import AttentionMetadata
from engine.step_inputs import StepInputs
from quant.kernels.transfer import is_pinning

SECTIONS: dict[str, torch.dtype] = {
    "query_start_loc": torch.int32,
    "seq_lens": torch.int32,
    "logits_indices": torch.int64,
    "scored_indices": torch.int64,
    "scored_token_ids": torch.int64,
    "unknown_places": torch.int64,
    "unknown_rows": torch.int64,
    "input_ids": torch.int64,
    "positions": torch.int64,
    "slot_mapping": torch.int64,
    "work_items": torch.int32,
    "block_table": torch.int32,
}
"""Name -> dtype, in the order in which the sections lie in the array: the one that differs most in size is the last."""
NO_INTEGERS = np.empty(0, np.int64)
ARRAY_DTYPES = {torch.int32: np.int32, torch.int64: np.int64}
MIN_SECTION_WORDS = 64
"""Words of 8 bytes that a section has from the start."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepTensors:
    """One step's numbers on the device, as `StepInputs` describes them. The next step overwrites them."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    """The place of each token in its sequence."""
    logits_indices: torch.Tensor
    scored_indices: torch.Tensor
    scored_token_ids: torch.Tensor
    attention: AttentionMetadata


class StepBuffers:
    """Memory for the numbers of one step at a time."""

    def __init__(self, device: torch.device, block_size: int) -> None:
        """Blocks of KV memory have `block_size` tokens."""
        self._device = device
        self._block_size = block_size
        self._capacities = dict.fromkeys(SECTIONS, MIN_SECTION_WORDS)
        self._shapes: list[tuple[int, ...]] = []
        self._allocate()

    def fill(
        self, inputs: StepInputs, work_items: npt.NDArray[np.int32], last_token_ids: torch.Tensor | None = None
    ) -> StepTensors:
        """Take in the numbers of a step, and those [num_items, numbers] that the attention backend made of it.

        `last_token_ids` [rows] are what the step before chose, if the host doesn't know all of `input_ids`.
        """
        values = self._values(inputs, work_items)
        shapes = [value.shape for value in values]
        if shapes != self._shapes:
            self._make_views(shapes)
        self._wait()
        for array, value in zip(self._arrays, values, strict=True):
            if value.size:
                array[...] = value
        self._send()
        self._take_unknown(len(inputs.unknown_places), last_token_ids)
        tensors = self._tensors
        return StepTensors(
            input_ids=tensors["input_ids"],
            positions=tensors["positions"],
            logits_indices=tensors["logits_indices"],
            scored_indices=tensors["scored_indices"],
            scored_token_ids=tensors["scored_token_ids"],
            attention=AttentionMetadata(
                query_start_loc=tensors["query_start_loc"],
                seq_lens=tensors["seq_lens"],
                block_table=tensors["block_table"],
                slot_mapping=tensors["slot_mapping"],
                work_items=tensors["work_items"],
                host_query_start_loc=inputs.query_start_loc,
                host_seq_lens=inputs.seq_lens,
            ),
        )

    def _wait(self) -> None:
        """Return once the last step's numbers are copied: a step without rows reads nothing back."""
        if self._copied is not None:
            self._copied.synchronize()

    def _send(self) -> None:
        """Copy the numbers to the device, if that has memory of its own."""
        if self._words is not self._host_words:
            self._words[: self._num_words].copy_(self._host_words[: self._num_words], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _take_unknown(self, num_unknown: int, last_token_ids: torch.Tensor | None) -> None:
        """Put the tokens that the host doesn't know among the input, on the device."""
        if last_token_ids is None or not num_unknown:
            return
        input_ids, places, rows = (self._tensors[name] for name in ("input_ids", "unknown_places", "unknown_rows"))
        token_ids = last_token_ids.index_select(0, rows[:num_unknown]).to(input_ids.dtype)
        input_ids.index_copy_(0, places[:num_unknown], token_ids)

    def _values(self, inputs: StepInputs, work_items: npt.NDArray[np.int32]) -> list[npt.NDArray[np.integer]]:
        """The numbers of all sections, in their order."""
        starts, seq_lens = np.array(inputs.query_start_loc), np.array(inputs.seq_lens)
        block_table = np.frombuffer(inputs.block_table, np.int32).reshape(len(seq_lens), -1)
        rows = np.arange(len(seq_lens)).repeat(starts[1:] - starts[:-1])
        positions = np.arange(len(rows)) + (seq_lens - starts[1:])[rows]
        places = positions // self._block_size  # of their blocks in the table
        slots = positions + (block_table[rows, places] - places) * self._block_size
        return [
            starts,
            seq_lens,
            _integers(inputs.logits_indices),
            _integers(inputs.scored_indices),
            _integers(inputs.scored_token_ids),
            _integers(inputs.unknown_places),
            _integers(inputs.unknown_rows),
            _integers(inputs.input_ids),
            positions,
            slots,
            work_items,
            block_table,
        ]

    def _allocate(self) -> None:
        num_words = sum(self._capacities.values())
        is_host = self._device.type == "cpu"
        is_pinned = is_pinning(self._device)
        if is_pinned:
            self._host_words = torch.zeros(num_words, dtype=torch.int64, pin_memory=True)
            self._host_array = self._host_words.numpy()
        else:
            self._host_array = np.zeros(num_words, np.int64)
            self._host_words = torch.from_numpy(self._host_array)
        self._copied = torch.Event(self._device) if is_pinned else None
        self._words = self._host_words if is_host else torch.zeros(num_words, dtype=torch.int64, device=self._device)

    def _make_views(self, shapes: list[tuple[int, ...]]) -> None:
        """Arrays to write to and tensors to read from, of these shapes; sections that are too small grow first."""
        sizes = [num_words(shape, dtype) for shape, dtype in zip(shapes, SECTIONS.values(), strict=True)]
        if any(size > capacity for size, capacity in zip(sizes, self._capacities.values(), strict=True)):
            for name, size in zip(SECTIONS, sizes, strict=True):
                while self._capacities[name] < size:
                    self._capacities[name] *= 2
            self._allocate()
        self._shapes = shapes
        self._arrays: list[npt.NDArray[np.generic]] = []
        self._tensors: dict[str, torch.Tensor] = {}
        first = 0
        for name, shape, size in zip(SECTIONS, shapes, sizes, strict=True):
            numbers = self._host_array[first:].view(ARRAY_DTYPES[SECTIONS[name]])
            self._arrays.append(numbers[: math.prod(shape)].reshape(shape))
            self._tensors[name] = _view(self._words, first, shape, SECTIONS[name])
            self._num_words = first + size
            first += self._capacities[name]


def _integers(values: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64) if values else NO_INTEGERS


def num_words(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Words of 8 bytes that such an array takes."""
    return -(-math.prod(shape) * dtype.itemsize // torch.int64.itemsize)


def _view(words: torch.Tensor, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The numbers of `dtype` that begin at word `first`."""
    return words[first:].view(dtype)[: math.prod(shape)].view(shape)
