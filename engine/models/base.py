"""The protocols between a model family and the runner and the loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from engine.attention.base import AttentionBackend, AttentionShape, LayerCache
from engine.layers.base import Ops, Rotation
from engine.layers.rope import Rotary
from parallel.linear import Cut
from parallel.state import ParallelState
from quant.config import Quantization


@dataclasses.dataclass(frozen=True, slots=True)
class ModelContext:
    """Everything that a model is built with beside its config.json, in one argument."""

    parallel: ParallelState
    quantization: Quantization
    ops: Ops
    activation_dtype: torch.dtype
    device: torch.device
    num_tensors: int | None = None
    """Tensors of the checkpoint; None: not known."""


class Loadable(Protocol):
    """A layer that takes in checkpoint tensors. `name` is a tensor's own, without the prefix, `part` says whose it is.

    For every tensor `cut`, `is_copied` and `load` are called in this order, and `finish` once after its last tensor.
    """

    def decides_order(self, name: str, part: int) -> bool:
        """Whether tensor `name` tells the order of the inputs. It is loaded first: the cut of others depends on it."""

    def cut(self, name: str, part: int, shape: Sequence[int]) -> Cut | None:
        """The part of the tensor, stored in `shape`, that this rank needs; None: all of it.

        Raises KeyError for an unknown name, ValueError for a wrong shape.
        """

    def is_copied(self, name: str, part: int, checkpoint_dtype: torch.dtype) -> bool:
        """Whether `load` makes a copy, rather than using the file's memory."""

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        """Take in the `cut` of a tensor. Raises ValueError for one that can't be used."""

    def missing(self, part: int) -> list[str]:
        """Names of the tensors that are needed and not loaded yet."""

    def finish(self, device: torch.device) -> None:
        """Move to the device and choose the kernels. Raises ValueError if no kernel takes the weights."""


CheckpointLayers = dict[str, tuple[Loadable, int]]
"""Checkpoint prefix (`model.layers.0.self_attn.q_proj`) -> the layer that takes its tensors, and which part of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowSelection:
    """The rows of a step that the last layer computes behind attention, where those are not all."""

    rows: torch.Tensor
    """[num_rows] int64."""
    narrow: Callable[[], None]
    """The last layer calls it once, before it takes the rows: adapters and programs see those alone from then on."""


class CausalLM(Protocol):
    """A decoder that predicts the next token."""

    vocab_size: int
    num_layers: int
    max_position_embeddings: int
    activations_per_token: int
    """Numbers that a forward pass holds at its peak for each token of the step, roughly."""
    max_inputs: int
    """Inputs of the widest matrix of this rank."""
    rotary: Rotary

    @property
    def attention_shape(self) -> AttentionShape:
        """The heads of this rank, once weights are loaded."""

    @property
    def lm_head(self) -> Loadable:
        """The layer that makes logits, of those rows only that need them."""

    num_ranks: int
    """Ranks that compute a forward pass together."""

    def __init__(self, config: Mapping[str, Any], context: ModelContext) -> None:
        """Build this rank's layers from config.json, without weights.

        Raises StartError for a model that isn't supported, `parallel.partition.SplitError` for one that can't be cut
        for so many ranks.
        """

    def checkpoint_layers(self) -> CheckpointLayers:
        """Every layer that takes in tensors of the checkpoint."""

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint tensor is known and not needed."""

    def why_no_graphs(self) -> list[str]:
        """Reasons why a graph can't have a forward pass of the loaded model; empty if it can."""

    def use_attention(self, backend: AttentionBackend, caches: list[LayerCache]) -> None:
        """Set what `forward` attends with; one cache per layer."""

    def forward(
        self, input_ids: torch.Tensor, rotation: Rotation, prepared: Any, selection: RowSelection | None = None
    ) -> torch.Tensor:
        """input_ids [num_tokens] int64 -> hidden states [num_rows, hidden_size], of rows in `selection`; None: of all.

        `rotary.prepare` makes rotation, and the attention backend's `prepare` makes prepared.
        """

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden_size] -> [rows, vocab_size] float32 on rank 0, no rows on the others."""
