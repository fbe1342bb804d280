"""The seam between a model family and `quantize`: a layer cut where its matrices get their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from engine.attention.base import AttentionShape
from engine.layers.rope import Rotary

STAGES: dict[str, str] = {
    "qwen2": "engine.quantize.qwen2_stages:Qwen2Stages",
    "qwen3": "engine.quantize.qwen3_stages:Qwen3Stages",
}
"""`model_type` of config.json -> lazy "module:Class" of a `LayerStages`. A family without one can still be served."""

LayerTensors = dict[str, torch.Tensor]
"""The tensors of one decoder layer in float32, by name below the layer's; `mlp.up_proj.weight` is [n, k]."""
OnInputs = Callable[[tuple[str, ...], Iterator[torch.Tensor]], None]
"""Takes matrices and the inputs [rows, k] that they share, batch by batch; may put other weights into the layer."""


class LayerStages(Protocol):
    """A family's decoder layer as calibration runs it: matrix after matrix, whole samples, no cache."""

    EMBEDDING: str
    """The stored tensor that maps token ids to hidden states."""
    LAYERS: str
    """The stored name of the layers: the first one's tensors begin with it and `.0.`."""
    MATRICES: tuple[tuple[str, ...], ...]
    """All matrices of a layer, in the order they run; those together share their inputs."""
    SOURCES: Mapping[tuple[str, ...], str]
    """Matrices -> the norm or matrix that makes their inputs. A matrix needs an output for each to take scales."""
    UNCLIPPED: tuple[str, ...]
    """Matrices whose outputs are multiplied with each other: the loss of their own outputs says too little."""

    def __init__(
        self, config: Mapping[str, Any], shape: AttentionShape, rotary: Rotary, num_tokens: int, device: torch.device
    ) -> None:
        """Prepare for samples of `num_tokens` each."""

    def run(self, index: int, layer: LayerTensors, hidden: torch.Tensor, on_inputs: OnInputs) -> None:
        """Run layer `index` on hidden [samples, num_tokens, hidden_size] float32 in the CPU's memory, in place.

        `on_inputs` is called for each of `MATRICES` before it runs.
        """
