"""Experts whose matrices are stored together, as `transformers` 5 keeps them, under the names of single ones.

`experts.gate_up_proj` [experts, 2 * inner, hidden] has each expert's `gate_proj` before its `up_proj`, and
`experts.down_proj` is [experts, hidden, inner]. Importing this module loads no torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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


class Part(Protocol):
    """A tensor within a stored one."""

    @property
    def stored_name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, source: WeightSource, index: tuple[slice, ...], *, is_kept: bool) -> torch.Tensor:
        """As `WeightSource.read`; the source has the stored tensor."""


class SplitWeights:
    """Implements `engine.checkpoint.weights.WeightSource` by another one: some tensors appear part by part."""

    def __init__(self, source: WeightSource, split: Callable[[str], Iterator[tuple[str, Part]]]) -> None:
        """`split` has the parts of a stored tensor by their names, none of a usual one. It may raise StartError."""
        self._source = source
        self._parts: dict[str, Part] = {}
        self.names: list[str] = []
        for name in source.names:
            parts = dict(split(name))
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
        return part.read(self._source, index, is_kept=is_kept)


@dataclasses.dataclass(frozen=True, slots=True)
class _Matrix:
    """One expert's matrix; implements `Part`."""

    stored_name: str
    expert: int
    first_output: int
    shape: tuple[int, int]

    def read(self, source: WeightSource, index: tuple[slice, ...], *, is_kept: bool) -> torch.Tensor:
        outputs, inputs = (*index, slice(None), slice(None))[:2]
        first, last, _ = outputs.indices(self.shape[0])
        rows = slice(self.first_output + first, self.first_output + last)
        place = slice(self.expert, self.expert + 1), rows, inputs
        return source.read(self.stored_name, place, is_kept=is_kept)[0]


def split_experts(source: WeightSource) -> SplitWeights:
    """Fused tensors appear matrix by matrix. Raises StartError for one of another shape."""
    return SplitWeights(source, functools.partial(_parts, source))


def _parts(source: WeightSource, name: str) -> Iterator[tuple[str, Part]]:
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
            part = _Matrix(name, expert, place * num_outputs, (num_outputs, num_inputs))
            yield f"{prefix}.{expert}.{matrix}.weight", part
