"""The seam between a checkpoint's weights and those who read them: names, shapes, dtypes, slices.

The loader, `quantize` and every list of names use this alone, so that another form of checkpoint (or one that is put
together of two) is a file with a class and a line in `open_weights`. Importing this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.checkpoint.fused_experts import has_fused_experts, split_experts
from engine.checkpoint.renamed_weights import RenamedWeights, names_of_models
from engine.checkpoint.safetensors_weights import SafetensorsWeights
from engine.checkpoint.weight_files import find_weight_files, read_gguf_index
from engine.link.model_files import read_json

if TYPE_CHECKING:
    import torch


class WeightSource(Protocol):
    """The tensors of one checkpoint. Every method raises StartError for a file that is not whole or not readable."""

    @property
    def files(self) -> Sequence[Path]:
        """All files that hold weights, in order."""

    @property
    def names(self) -> Sequence[str]:
        """Every tensor's name; tensors of one file follow each other."""

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """The stored dtype in the words of safetensors: `F32`, `BF16`, `I32`."""

    def read(self, name: str, index: tuple[slice, ...] = (), *, is_kept: bool = False) -> torch.Tensor:
        """The part of the tensor that `index` cuts out, in the stored dtype; all of it by default.

        With `is_kept` the caller goes on to use the tensor's memory, which may be the file's. Otherwise it drops the
        tensor soon, and the source sees to it that the pages read do not count as memory of this process for long.
        """


def open_weights(folder: Path) -> WeightSource:
    """The weights of a model's folder. Raises StartError when there are none."""
    gguf = read_gguf_index(folder)
    if gguf is not None:
        from engine.checkpoint.gguf_weights import GgufWeights  # it loads torch

        return GgufWeights(gguf)
    weights: WeightSource = SafetensorsWeights(find_weight_files(folder).paths)
    is_tied = bool(read_json(folder / "config.json").get("tie_word_embeddings"))
    stored_names = names_of_models(weights.names, is_tied=is_tied)
    if any(name != stored for name, stored in stored_names.items()):
        weights = RenamedWeights(weights, stored_names)
    return split_experts(weights) if has_fused_experts(weights.names) else weights
