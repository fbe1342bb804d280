"""Experts whose matrices are stored together, as `transformers` 5 keeps them, under the names of single ones.

`experts.gate_up_proj` [experts, 2 * inner, hidden] has each expert's `gate_proj` before its `up_proj`, and
`experts.down_proj` is [experts, hidden, inner]. Importing this module loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.link.errors import StartError

if TYPE_CHECKING:
    import torch

    from engine.checkpoint.weights import WeightSource

FUSED: dict[str, Sequence[str]] = {
    ".experts.gate_up_proj": ("gate_proj", "up_proj"),
    ".experts.down_proj": ("down_proj",),
}
"""The end of a tensor's name -> the matrices of which it holds every expert's, in the order of their outputs."""


def has_fused_experts(names: Sequence[str]) -> bool:
    return any(_matrices_of(name) for name in names)


def _matrices_of(name: str) -> Sequence[str]:
    """The matrices that a tensor holds together; none: it is a usual one."""
    return next((matrices for end, matrices in FUSED.items() if name.endswith(end)), ())


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """One expert's matrix within a stored tensor."""

    stored_name: str
    expert: int
    first_output: int
    shape: tuple[int, int]


class SplitExperts:
    """Implements `engine.checkpoint.weights.WeightSource` by another one: fused tensors appear matrix by matrix."""

    def __init__(self, source: WeightSource) -> None:
        """Raises StartError for a fused tensor of another shape."""
        self._source = source
        self._parts: dict[str, _Part] = {}
        self.names: list[str] = []
        for name in source.names:
            parts = dict(_parts(source, name))
            self._parts |= parts
            self.names += parts or [name]
        self.files = source.files

    def _stored_name(self, name: str) -> str:
        return self._parts[name].stored_name if name in self._parts else name

    def file(self, name: str) -> Path:
        return self._source.file(self._stored_name(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts[name].shape if name in self._parts else self._source.shape(name)

    def dtype(self, name: str) -> str:
        return self._source.dtype(self._stored_name(name))

    def read(self, name: str, index: tuple[slice, ...] = (), *, is_kept: bool = False) -> torch.Tensor:
        part = self._parts.get(name)
        if part is None:
            return self._source.read(name, index, is_kept=is_kept)
        outputs, inputs = (*index, slice(None), slice(None))[:2]
        first, last, _ = outputs.indices(part.shape[0])
        rows = slice(part.first_output + first, part.first_output + last)
        place = slice(part.expert, part.expert + 1), rows, inputs
        return self._source.read(part.stored_name, place, is_kept=is_kept)[0]


def _parts(source: WeightSource, name: str) -> Iterator[tuple[str, _Part]]:
    """The matrices of a stored tensor by the names that models have for them; none of a usual tensor."""
    matrices = _matrices_of(name)
    if not matrices:
        return
    shape = source.shape(name)
    if len(shape) != 3 or 0 in shape or shape[1] % len(matrices):  # no bytes bound the number of empty experts
        raise StartError(
            f"{source.file(name).name} has a tensor {name} of shape {list(shape)}, and the matrices of all experts are "
            "[experts, outputs, inputs]: save the model once more with `transformers`"
        )
    num_experts, num_outputs, num_inputs = shape[0], shape[1] // len(matrices), shape[2]
    prefix = name.rpartition(".")[0]
    for expert in range(num_experts):
        for place, matrix in enumerate(matrices):
            part = _Part(name, expert, place * num_outputs, (num_outputs, num_inputs))
            yield f"{prefix}.{expert}.{matrix}.weight", part
