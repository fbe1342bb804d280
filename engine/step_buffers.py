"""A step's numbers where the kernels read them: one array, filled once a step, and one copy of it to the device.

Every list has a section of the array, whose place stays while the section is large enough: sections grow by doubling
and never shrink. The tensors of a step are views of their sections. On a CPU these are the host's own array, and
nothing is copied.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
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
TYPE_CODES = ["i" if dtype == torch.int32 else "q" for dtype in SECTIONS.values()]
"""What `array` calls the sections' dtypes."""
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
        self._tensors: dict[str, torch.Tensor] = {}
        self._first_bytes = [0] * len(SECTIONS)
        self._allocate()

    def fill(
        self, inputs: StepInputs, work_items: npt.NDArray[np.int32], last_token_ids: torch.Tensor | None = None
    ) -> StepTensors:
        """Take in the numbers of a step, and those [num_items, numbers] that the attention backend made of it.

        `last_token_ids` [rows] are what the step before chose, if the host doesn't know all of `input_ids`.
        """
        lists = self._lists(inputs)
        shapes: list[tuple[int, ...]] = [(len(numbers),) for numbers in lists]
        shapes += [work_items.shape, (len(inputs.seq_lens), inputs.table_width)]
        if shapes != self._shapes:
            self._make_views(shapes)
        self._wait()
        self._write(lists, work_items, inputs.block_table)
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

    def _lists(self, inputs: StepInputs) -> list[Sequence[int]]:
        """The numbers of all sections but the last two, in their order.

        They are plain Python, as is the way in which they are written: between two steps the weights take the caches,
        and what then has to come back for a few numbers takes longer than the numbers.
        """
        positions, slots = self._places(inputs)
        return [
            inputs.query_start_loc,
            inputs.seq_lens,
            inputs.logits_indices,
            inputs.scored_indices,
            inputs.scored_token_ids,
            inputs.unknown_places,
            inputs.unknown_rows,
            inputs.input_ids,
            positions,
            slots,
        ]

    def _places(self, inputs: StepInputs) -> tuple[list[int], list[int]]:
        """The position and the slot of each token."""
        size, width, starts = self._block_size, inputs.table_width, inputs.query_start_loc
        blocks = memoryview(inputs.block_table).cast("i")
        positions: list[int] = []
        slots: list[int] = []
        for index, seq_len in enumerate(inputs.seq_lens):
            first = seq_len - starts[index + 1] + starts[index]
            positions += range(first, seq_len)
            while first < seq_len:
                place, offset = divmod(first, size)
                count = min(size - offset, seq_len - first)
                slot = blocks[index * width + place] * size + offset
                slots += range(slot, slot + count)
                first += count
        return positions, slots

    def _write(self, lists: Sequence[Sequence[int]], work_items: npt.NDArray[np.int32], block_table: bytes) -> None:
        """Put the numbers of all sections into the host's array."""
        parts = [array(code, numbers).tobytes() for code, numbers in zip(TYPE_CODES, lists, strict=False)]
        for first, part in zip(self._first_bytes, [*parts, work_items.tobytes(), block_table], strict=True):
            self._host_bytes[first : first + len(part)] = part

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
        self._host_bytes = self._host_array.data.cast("B")
        self._shapes = []
        self._copied = torch.Event(self._device) if is_pinned else None
        self._words = self._host_words if is_host else torch.zeros(num_words, dtype=torch.int64, device=self._device)

    def _make_views(self, shapes: list[tuple[int, ...]]) -> None:
        """Tensors of these shapes, and where their numbers are written; sections that are too small grow first."""
        sizes = [num_words(shape, dtype) for shape, dtype in zip(shapes, SECTIONS.values(), strict=True)]
        if any(size > capacity for size, capacity in zip(sizes, self._capacities.values(), strict=True)):
            for name, size in zip(SECTIONS, sizes, strict=True):
                while self._capacities[name] < size:
                    self._capacities[name] *= 2
            self._allocate()
        first = 0
        for index, (name, dtype) in enumerate(SECTIONS.items()):
            if not self._shapes or shapes[index] != self._shapes[index]:  # the others' tensors stay what they are
                self._tensors[name] = _view(self._words, first, shapes[index], dtype)
            self._first_bytes[index] = torch.int64.itemsize * first
            self._num_words = first + sizes[index]
            first += self._capacities[name]
        self._shapes = shapes


def num_words(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Words of 8 bytes that such an array takes."""
    return -(-math.prod(shape) * dtype.itemsize // torch.int64.itemsize)


def _view(words: torch.Tensor, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The numbers of `dtype` that begin at word `first`."""
    return words[first:].view(dtype)[: math.prod(shape)].view(shape)
