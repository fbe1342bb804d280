"""Tensors under the names that models know them by, whatever program has saved them. Importing it loads no torch.

A decoder without its head is saved without the prefix `model.`, and wrappers put one of their own before all names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from engine.checkpoint.weights import WeightSource

DECODER, HEAD = "model.", "lm_head."
EMBEDDING = "embed_tokens.weight"
"""The tensor that every decoder has once."""


def names_of_models(stored: Sequence[str], *, is_tied: bool = False) -> dict[str, str]:
    """A model's name -> the stored one, for all tensors; names that fit no rule stay as they are.

    The embedding tells the prefix of the decoder, and what stands before `model.` in it is that of the head as well.
    Where head and embedding are one (`is_tied`), `save_model` of safetensors keeps the name that sorts first: the head.
    """
    prefixes = [name.removesuffix(EMBEDDING) for name in stored if f".{name}".endswith(f".{EMBEDDING}")]
    prefix = prefixes[0] if len(prefixes) == 1 else DECODER
    wrapper = prefix.removesuffix(DECODER)
    added = DECODER if prefix == wrapper else ""

    def name_of_model(name: str) -> str:
        rest = name.removeprefix(wrapper)
        return rest if not name.startswith(wrapper) or rest.startswith(HEAD) else added + rest

    names = {name: name_of_model(name) for name in stored}
    head, table = f"{HEAD}weight", f"{DECODER}{EMBEDDING}"
    is_head_alone = is_tied and table not in names.values()
    return {table if is_head_alone and name == head else name: each for each, name in names.items()}


class RenamedWeights:
    """Implements `engine.checkpoint.weights.WeightSource` by another one, whose tensors get other names."""

    def __init__(self, source: WeightSource, stored_names: Mapping[str, str]) -> None:
        self._source = source
        self._stored_names = stored_names
        self.files = source.files

    @property
    def names(self) -> list[str]:
        return [*self._stored_names]

    def file(self, name: str) -> Path:
        return self._source.file(self._stored_names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored_names[name])

    def dtype(self, name: str) -> str:
        return self._source.dtype(self._stored_names[name])

    def read(self, name: str, index: tuple[slice, ...] = (), *, is_kept: bool = False) -> torch.Tensor:
        return self._source.read(self._stored_names[name], index, is_kept=is_kept)
