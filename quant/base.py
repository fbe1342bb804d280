"""What a quantisation method must offer. A linear layer holds a method and never asks which one it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """One stored tensor of a linear layer, as its checkpoint shard `[out_features, in_features]` has it.

    `output_dim` and `input_dim` say which dimension is cut when outputs or inputs are sharded (None: not cut); merged
    layers (q, k, v; gate, up) are laid side by side along `output_dim`.
    """

    shape: tuple[int, ...]
    output_dim: int | None
    input_dim: int | None


class RunningWeight(Protocol):
    """A weight in the form its kernel reads: the result of loading, whatever the checkpoint's format was."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features] -> [rows, out_features], in the activations' dtype."""


class LinearMethod(Protocol):
    """From stored tensors to a running weight."""

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        """The stored tensors by name, without the layer's prefix."""

    def storage_dtype(self, name: str, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The dtype that tensor `name` is kept in."""

    def finish(self, params: Mapping[str, torch.Tensor]) -> RunningWeight:
        """Make the running weight once every tensor is there."""
