"""An adapter's changes of all experts in two tensors, as `peft` stores them, under the names of single matrices.

In `transformers` 5 all experts of a layer are parameters of one module (`fused_experts`). `target_parameters` of
adapter_config.json names them, and `peft` wraps the module once for each, in their order: `experts.lora_A` belongs to
the last of them, `experts.base_layer.lora_A` to the one before. A is [experts * r, inputs], expert after expert; B is
[outputs, r * experts], in which neighbours are experts. Importing this module loads no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.adapter_config import MERGE_WITH_PEFT
from engine.checkpoint.fused_experts import FUSED, Part, SplitWeights
from engine.link.errors import StartError
from engine.link.model_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch

    from engine.checkpoint.adapter_config import AdapterSettings
    from engine.checkpoint.weights import WeightSource

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(.*\.experts)((?:\.base_layer)*)\.lora_([AB])(?:\.default)?(?:\.weight)?"
)
"""A tensor of all experts of a layer. Groups: the module, a word for each wrapper around it, A or B."""
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
TURNED_BEFORE = (0, 19, 1)
"""The version of `peft` from which on A has a matrix's inputs; before, it had the outputs of experts."""
LAYOUTS = {None: False, "rank_major": False, "grouped_by_expert": True}
"""`lora_B_layout`, a key that unsloth adds -> whether B has expert after expert, as A has. `peft` knows one order."""

MAX_PARTS = 6 * 2**16
"""Halves of changes of all experts: the largest models have 25,000 experts, whose three matrices have two each."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Half:
    """The half of the change of one expert's matrix; implements `engine.checkpoint.fused_experts.Part`."""

    stored_name: str
    rows: slice
    columns: slice
    shape: tuple[int, int]

    def read(self, source: WeightSource, index: tuple[slice, ...], *, is_kept: bool) -> torch.Tensor:
        return source.read(self.stored_name, (self.rows,), is_kept=is_kept)[:, self.columns][index]


class SplitExpertChanges(SplitWeights):
    """An adapter's weights, whose changes of experts appear matrix by matrix."""

    def __init__(
        self,
        source: WeightSource,
        settings: AdapterSettings,
        config: Mapping[str, Any],
        rank_of: Callable[[str], Any],
    ) -> None:
        """`config` is adapter_config.json, of which `settings` are a part; `rank_of` a parameter's name says its rank.

        Raises StartError.
        """
        self._settings, self._rank_of = settings, rank_of
        self._parameters: dict[str, str] = {}
        self._is_grouped = functools.cache(functools.partial(_has_grouped_experts, settings.folder, config))
        super().__init__(source, self._split)

    def parameter(self, module: str) -> str:
        """The name that patterns of adapter_config.json are compared with: a module's, or that of its parameter."""
        name = f"{module}.weight"
        return self._parameters.get(module, name if self._settings.is_target_parameter(name) else module)

    def _split(self, name: str) -> Iterator[tuple[str, Part]]:
        """The halves of changes that a stored tensor has, by the names that they have for single matrices."""
        match = _TENSOR.fullmatch(name)
        if match is None:
            return
        is_grouped = self._is_grouped()
        module, depth = match[1], match[2].count(".")
        named = [f"{module}{end.removeprefix('.experts')}" for end in FUSED]
        parameters = [parameter for parameter in named if self._settings.is_target_parameter(parameter)]
        if depth >= len(parameters):
            raise StartError(
                f"{self._settings.folder} has {name}, and target_parameters in {ADAPTER_CONFIG} names no such "
                "parameter: they do not belong together"
            )
        parameter = parameters[-1 - depth]
        matrices = FUSED[f".experts.{parameter.rpartition('.')[2]}"]
        shape, rank, is_a = self._source.shape(name), self._rank_of(parameter), match[3] == "A"
        stacked = 0 if is_a else 1  # the dimension that has the ranks of all experts
        if not _is_stack(shape, stacked, rank) or (not is_a and shape[0] % len(matrices)):
            raise StartError(
                f"{self._settings.folder} has {name} {list(shape)}, and {ADAPTER_CONFIG} says rank {rank!r:.20} for "
                f"{parameter}: they do not belong together"
            )
        num_experts, num_outputs = shape[stacked] // rank, shape[0] // len(matrices)
        if len(self._parts) + num_experts * len(matrices) > MAX_PARTS:
            raise StartError(
                f"{self._settings.folder} changes more experts than any model has: fetch the adapter again"
            )
        for expert in range(num_experts):
            own = slice(expert * rank, (expert + 1) * rank)
            for place, matrix in enumerate(matrices):
                single = f"{module}.{expert}.{matrix}"
                self._parameters[single] = parameter
                if is_a:
                    part = _Half(name, own, slice(None), (rank, shape[1]))
                else:
                    rows = slice(place * num_outputs, (place + 1) * num_outputs)
                    columns = own if is_grouped else slice(expert, None, num_experts)
                    part = _Half(name, rows, columns, (num_outputs, rank))
                yield f"{single}.lora_{match[3]}.weight", part


def _is_stack(shape: Sequence[int], stacked: int, rank: Any) -> bool:
    """Whether a matrix has so many ranks of some experts; none without numbers, whose experts no bytes bound."""
    return len(shape) == 2 and 0 not in shape and type(rank) is int and rank > 0 and not shape[stacked] % rank


def _has_grouped_experts(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether B has expert after expert. Raises StartError for an order that is not known."""
    layout, version = config.get("lora_B_layout"), config.get("peft_version")
    if not isinstance(layout, str | None) or layout not in LAYOUTS:
        raise StartError(
            f"{folder / ADAPTER_CONFIG} has lora_B_layout {layout!r:.40}: {', '.join(filter(None, LAYOUTS))} are known"
        )
    match = _VERSION.match(version) if isinstance(version, str) else None
    if match and tuple(int(number or 0) for number in match.groups()) < TURNED_BEFORE:
        raise StartError(
            f"{folder} changes experts and was saved by `peft` {match[0]}, which took inputs for outputs: with that "
            f"version, {MERGE_WITH_PEFT}"
        )
    return LAYOUTS[layout]
