"""The protocol of attention backends, and the one description of a step that they get."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.layers.base import Rotation


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionShape:
    """One rank's attention: its sizes, and how exact it is."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_rounded: bool = False
    """Whether float32 activations may be rounded to the dtype of the cache."""


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's tokens: `num_seqs` sequences, each with some query tokens at the end of its known tokens.

    Tensors are on the device. Their addresses stay while their sizes do, so that a graph may read them.
    """

    query_start_loc: torch.Tensor
    """[num_seqs + 1] int32: sequence i's query tokens are rows `query_start_loc[i] : query_start_loc[i + 1]`."""
    seq_lens: torch.Tensor
    """[num_seqs] int32: tokens known after this step, the query tokens included."""
    block_table: torch.Tensor
    """[num_seqs, max_blocks] int32: the sequence's blocks, padded with 0. Backends that a graph may capture know from
    their work items where a sequence's blocks begin, and may get larger memory in which the table begins."""
    slot_mapping: torch.Tensor
    """[num_tokens] int64: where each query token's KV goes, `block_id * block_size + offset`; -1: nowhere, in rows of
    padding, which only backends get that a graph may capture."""
    work_items: torch.Tensor
    """[num_items, numbers] int32: what `AttentionBackend.work_items` made of the step. More memory after it does no
    harm to backends that a graph may capture."""
    host_query_start_loc: Sequence[int]
    """`query_start_loc` in host memory: nothing is read back from the device."""
    host_seq_lens: Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class RepeatableStep:
    """What `AttentionBackend.prepare` returns if calls of kernels, made again, compute another step of a `variant`.

    The calls have no number that depends on the rows: kernels read those from the sizes of their arrays.
    """

    variant: tuple[int, ...]
    """Everything by which the calls differ."""
    tensors: Sequence[torch.Tensor]
    """The step's numbers, in the order in which each step has them. Nothing else changes from step to step."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, in a layout that only its backend knows.

    A backend that stores more with them, as the scales of rounded keys, or whose blocks don't lie one after the other,
    returns a subclass.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def by_block(self, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [num_blocks, ...] of keys and values."""
        return self.keys.view(num_blocks, -1), self.values.view(num_blocks, -1)

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor, num_blocks: int) -> None:
        """Copy blocks `sources` [copies] int64 to `targets` [copies] int64; the cache has `num_blocks` in all.

        All sources are read before a target is written.
        """
        for blocks in self.by_block(num_blocks):
            blocks[targets] = blocks[sources]


class AttentionBackend(Protocol):
    """Writes the step's keys and values into the cache and attends causally over it."""

    block_sizes: ClassVar[Sequence[int]]
    """Numbers of tokens that a block may have, the best one first."""
    block_size: int
    """The one in use."""
    max_captured_tokens: ClassVar[int]
    """Query tokens of a sequence up to which a graph may capture `forward`, 0 where none may: the launches depend on
    the number of rows and the sizes of the metadata alone, and rows that belong to no sequence may hold anything."""
    has_rotation: ClassVar[bool]
    """Whether `forward` rotates queries and keys, as it touches them anyway. Otherwise the model does so before."""

    @staticmethod
    def why_not(shape: AttentionShape) -> list[str]:
        """Reasons why this backend can't serve such a model; empty if it can."""

    def __init__(self, shape: AttentionShape, block_size: int) -> None:
        """`block_size` is one of `block_sizes`."""

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Memory that a block of one layer takes if keys and values are stored in `dtype`, scales included."""

    def allocate(self, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Memory for one layer. A slot is read once a token was written there, and may hold anything before."""

    def work_items(
        self, query_start_loc: Sequence[int], seq_lens: Sequence[int], table_width: int
    ) -> npt.NDArray[np.int32]:
        """The parts [num_items, numbers] into which the backend divides a step, worked out on the host.

        `table_width`: numbers that the block table has for each sequence.
        They travel to the device with the step's other numbers, and `prepare` finds them in the metadata.
        """

    def work_bytes(self, num_items: int) -> int:
        """Memory that `forward` takes for so many work items, beside its result; for backends that graphs capture."""

    def prepare(self, metadata: AttentionMetadata) -> Any:
        """Work out once a step what `forward` of every layer gets."""

    def forward(
        self,
        qkv: torch.Tensor,
        cache: LayerCache,
        prepared: Any,
        window: int | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] -> [num_tokens, num_heads * head_dim].

        `window`: a token attends to itself and the `window - 1` tokens before it; None: to all before it. What has
        left every window stays in the cache: blocks belong to all layers, and some of them see everything.

        `rotation`: what queries and keys are still to be rotated by, in qkv itself or not; None unless `has_rotation`.
        """
