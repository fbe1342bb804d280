"""An adapter (LoRA) merged into its base model while the weights are read. Importing it loads no torch.

A matrix W [outputs, inputs] becomes W + scaling * B @ A, with A [r, inputs] and B [outputs, r], as `peft` merges it, in
float32: --dtype float32 gives the ids of the merged model, whatever the base model is stored in.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.files import count_tokens
from engine.checkpoint.renamed_weights import EMBEDDING
from engine.checkpoint.safetensors_weights import SafetensorsWeights
from engine.checkpoint.weights import open_weights
from engine.link.errors import StartError
from engine.link.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from quant.matching_time import MatchingTime

if TYPE_CHECKING:
    import torch

    from engine.checkpoint.weights import WeightSource

logger = logging.getLogger(__name__)

_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
"""A tensor of an adapter. Groups: the module, whether that is a table of embeddings, A or B."""
_COPY = re.compile(r"(?:base_model\.model\.)?((?:.+\.)?(?:embed_tokens|lm_head))(?:\.base_layer)?\.weight")
"""A tensor of the base model that `peft` saves along where embeddings are targets, were resized, or are asked for
(`save_embedding_layers`). Group: the module."""
COPIED_ROWS = 8192
"""Rows of such a tensor that are compared at a time."""

OTHER_KINDS: tuple[tuple[str, str], ...] = (
    ("use_dora", "DoRA"),
    ("lora_bias", "biases"),
    ("modules_to_save", "whole modules (modules_to_save)"),
    ("trainable_token_indices", "single tokens (trainable_token_indices)"),
    ("target_parameters", "parameters by name (target_parameters)"),
    ("layer_replication", "repeated layers (layer_replication)"),
    ("alora_invocation_tokens", "a part of each prompt only (aLoRA)"),
    ("use_qalora", "QALoRA"),
)
"""A key of adapter_config.json that must say nothing -> what the adapter is made of where it says something."""
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` of adapters whose training has begun by changing the base model."""
DTYPES = ("F32", "F16", "BF16")
MAX_SCALING = 3.4028234e38
"""The largest number in float32."""
MAX_CONFIG_BYTES = 4 << 20
"""Largest adapter_config.json. `peft` writes some kilobytes, also with settings for every module; who parses a file of
hundreds of megabytes while requests run takes gigabytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Update:
    """The change of one matrix: which tensors of the adapter make it, and their factor."""

    a: str
    b: str
    scaling: float
    is_embedding: bool

    def part(self, adapter: WeightSource, rows: slice, columns: slice) -> torch.Tensor:
        """The rows and columns of scaling * B @ A, float32."""
        every = slice(None)
        if self.is_embedding:  # A [r, rows], B [columns, r]
            a, b = adapter.read(self.a, (every, rows)), adapter.read(self.b, (columns, every))
            return (a.float().T @ b.float().T) * self.scaling
        a, b = adapter.read(self.a, (every, columns)), adapter.read(self.b, (rows, every))
        return (b.float() @ a.float()) * self.scaling


class MergedWeights:
    """Implements `engine.checkpoint.weights.WeightSource` by a base model and an adapter."""

    def __init__(self, base: WeightSource, base_folder: Path, folder: Path) -> None:
        """`folder` is the adapter's. Raises StartError if it does not fit the base model or can't be merged."""
        self._base = base
        self._adapter = SafetensorsWeights([folder / ADAPTER_WEIGHTS])
        self._updates = _read_updates(folder, self._adapter)
        self.files = [*base.files, *self._adapter.files]
        for name, update in self._updates.items():
            self._check(folder, name, update)
        _refuse_changed_copies(folder, self._adapter, base, base_folder)

    @property
    def names(self) -> Sequence[str]:
        return self._base.names

    @property
    def changed_names(self) -> Sequence[str]:
        """The tensors that the adapter changes."""
        return [*self._updates]

    def file(self, name: str) -> Path:
        return self._base.file(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> str:
        return "F32" if name in self._updates else self._base.dtype(name)

    def read(self, name: str, index: tuple[slice, ...] = (), *, is_kept: bool = False) -> torch.Tensor:
        update = self._updates.get(name)
        if update is None:
            return self._base.read(name, index, is_kept=is_kept)
        rows, columns = (*index, slice(None), slice(None))[:2]
        return self._base.read(name, index).float() + update.part(self._adapter, rows, columns)

    def _check(self, folder: Path, name: str, update: _Update) -> None:
        if name not in self._base.names:
            raise StartError(
                f"{folder} changes {name}, which its base model does not have: give the adapter the model that it was "
                f"made for, in {ADAPTER_CONFIG}"
            )
        a, b, shape = self._adapter.shape(update.a), self._adapter.shape(update.b), self._base.shape(name)
        outputs_inputs = (a[-1], b[0]) if update.is_embedding else (b[0], a[-1])
        if a[0] != b[1] or outputs_inputs != shape:
            raise StartError(
                f"{folder} changes {name} by {update.b} {list(b)} and {update.a} {list(a)}, the base model has "
                f"{list(shape)}: they do not belong together"
            )


class AdapterWeights:
    """The changes of an adapter that is kept apart from its model. The file is mapped as long as this lives."""

    def __init__(self, folder: Path) -> None:
        """Raises StartError for a folder without an adapter, or with one of another kind."""
        if not os.path.isfile(folder / ADAPTER_CONFIG):  # Path's raises for a name that is too long
            raise StartError(f"{folder} has no {ADAPTER_CONFIG}: an adapter (LoRA) is a folder with it, as peft writes")
        self.folder = folder
        self._weights = SafetensorsWeights([folder / ADAPTER_WEIGHTS])
        self._updates = {
            name.removesuffix(".weight"): update for name, update in _read_updates(folder, self._weights).items()
        }

    @property
    def modules(self) -> Sequence[str]:
        """The matrices that it changes, by the names that checkpoints have for them."""
        return [*self._updates]

    def is_of_embeddings(self, module: str) -> bool:
        return self._updates[module].is_embedding

    def shapes(self, module: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        update = self._updates[module]
        return self._weights.shape(update.a), self._weights.shape(update.b)

    @property
    def max_rank(self) -> int:
        return max((self.shapes(module)[0][0] for module in self._updates), default=0)

    def refuse_changed_copies(self, base: Path) -> None:
        """Raise StartError for an adapter with tensors of a base model that are not those in the folder `base`."""
        if any(map(_COPY.fullmatch, self._weights.names)):
            _refuse_changed_copies(self.folder, self._weights, open_weights(base), base)

    def read(self, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A, B and the factor of their product."""
        update = self._updates[module]
        a, b = (self._weights.read(name, is_kept=True) for name in (update.a, update.b))
        return a, b, update.scaling


def _read_updates(folder: Path, adapter: WeightSource) -> dict[str, _Update]:
    """The base model's tensor -> its change. Raises StartError for an adapter of another kind."""
    config = read_json(folder / ADAPTER_CONFIG, MAX_CONFIG_BYTES)
    if not os.path.isfile(folder / ADAPTER_WEIGHTS):
        raise StartError(
            f"{folder} has no {ADAPTER_WEIGHTS}, and pickled weights (.bin), which can run code, are never loaded: "
            "save it once more with `peft`, save_pretrained(...)"
        )
    _refuse_other_kinds(folder, config)
    settings = _read_settings(folder, config)
    matching_time = MatchingTime(functools.partial(_unusable, folder))
    updates = {}
    for module, (is_embedding, tensors) in _modules(folder, adapter).items():
        if tensors.keys() != {"A", "B"}:
            raise StartError(f"{folder} has only one half of the change of {module}: fetch the adapter again")
        for name in tensors.values():
            _check_stored(folder, name, adapter)
        with matching_time:
            scaling = settings.scaling(folder, module, rank=adapter.shape(tensors["A"])[0])
        updates[f"{module}.weight"] = _Update(tensors["A"], tensors["B"], scaling, is_embedding)
    if not updates:
        raise StartError(f"{folder / ADAPTER_WEIGHTS} has no tensors: save the adapter once more with `peft`")
    return updates


def _modules(folder: Path, adapter: WeightSource) -> dict[str, tuple[bool, dict[str, str]]]:
    """Module -> whether it is a table of embeddings, and the names of its A and B. Raises StartError."""
    modules: dict[str, tuple[bool, dict[str, str]]] = {}
    for name in adapter.names:
        match = _TENSOR.fullmatch(name)
        if _COPY.fullmatch(name):
            continue
        if match is None:
            raise StartError(f"{folder} has a tensor {name}, which is no part of a LoRA: merge the adapter with `peft`")
        is_embedding, tensors = modules.setdefault(match[1], (bool(match[2]), {}))
        if match[3] in tensors or is_embedding != bool(match[2]):  # the same module under names of two kinds
            raise StartError(
                f"{folder} has {name} and {next(iter(tensors.values()))}, two changes of {match[1]}: save the adapter "
                "once more with `peft`"
            )
        tensors[match[3]] = name
    return modules


def _refuse_changed_copies(folder: Path, adapter: WeightSource, base: WeightSource, base_folder: Path) -> None:
    """Raise StartError for a table of embeddings or a head that was saved along and is not the base model's own."""
    for name in adapter.names:
        if match := _COPY.fullmatch(name):
            is_tied = not any(stored.startswith(f"{match[1]}.") for stored in base.names)
            stored = f"model.{EMBEDDING}" if is_tied else f"{match[1]}.weight"
            if not _is_copy(adapter, name, base, stored):
                raise StartError(
                    f"{folder} has {name} {list(adapter.shape(name))}, and {stored} of its base model is another, or "
                    "quantized: such training is not kept apart. Merge the adapter with `peft`, merge_and_unload() and "
                    "save_pretrained(...), and give the folder that this writes"
                )
            if _lacks_tokens(adapter.shape(name)[0], base.shape(stored)[0], base_folder):
                raise StartError(
                    f"{folder} has {name} {list(adapter.shape(name))}, fewer rows than its base model has tokens: what "
                    "is missing may have been trained. Save the adapter once more with `peft`"
                )
            logger.info("%s has a copy of the base model's %s, which is not used", folder, stored)


def _is_copy(adapter: WeightSource, name: str, base: WeightSource, stored: str) -> bool:
    """Whether a tensor has the base model's numbers, in the dtype that the model was trained in.

    Rows at the end may be cut off.
    """
    shape, base_shape = adapter.shape(name), base.shape(stored) if stored in base.names else ()
    if len(shape) != 2 or len(base_shape) != 2 or shape[0] > base_shape[0] or shape[1] != base_shape[1]:
        return False
    if adapter.dtype(name) not in DTYPES:  # rounded to integers, every table of small numbers is the same
        return False
    for first in range(0, shape[0], COPIED_ROWS):
        rows = (slice(first, min(first + COPIED_ROWS, shape[0])),)
        copy = adapter.read(name, rows)
        if not base.read(stored, rows).to(copy.dtype).equal(copy):
            return False
    return True


def _lacks_tokens(num_rows: int, num_base_rows: int, base_folder: Path) -> bool:
    """Whether rows are cut off that are not padding: `resize_token_embeddings(len(tokenizer))` leaves all tokens'."""
    return num_rows < num_base_rows and num_rows < (count_tokens(base_folder) or num_base_rows)


def _check_stored(folder: Path, name: str, adapter: WeightSource) -> None:
    """Raise StartError for a tensor that is no matrix, or of numbers that adapters are never saved in."""
    shape, dtype = adapter.shape(name), adapter.dtype(name)
    if len(shape) != 2 or dtype not in DTYPES:
        raise StartError(
            f"{folder} has {name} as {dtype} {list(shape)}, and an adapter is made of matrices in {', '.join(DTYPES)}: "
            "save it once more with `peft`"
        )


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    kinds = [kind for key, kind in OTHER_KINDS if config.get(key)]
    if config.get("peft_type") != "LORA":
        kinds.append(f"{config.get('peft_type')!s:.40}")
    if config.get("bias", "none") != "none":
        kinds.append("biases")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        kinds.append(f"a model for another task ({config['task_type']!s:.40})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        kinds.append(f"a base model that its training has changed ({start:.40})")
    if kinds:
        raise StartError(
            f"{folder} is an adapter of {kinds[0]}, and only plain LoRA is merged here: merge it with `peft`, "
            "merge_and_unload() and save_pretrained(...), and give the folder that this writes"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _ByModule:
    """A number of adapter_config.json, and others for the modules whose names end in what a pattern matches."""

    default: Any
    patterns: Sequence[tuple[re.Pattern[str], Any]]

    def value(self, module: str) -> Any:
        return next((value for pattern, value in self.patterns if pattern.fullmatch(module)), self.default)


@dataclasses.dataclass(frozen=True, slots=True)
class _Settings:
    """The part of adapter_config.json that says what factor each module's change has."""

    ranks: _ByModule
    alphas: _ByModule
    is_rank_stabilized: bool

    def scaling(self, folder: Path, module: str, *, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA; `rank` is what is stored."""
        stated = self.ranks.value(module)
        if stated is not None and stated != rank:
            raise StartError(
                f"{folder} changes {module} by matrices of rank {rank}, and {ADAPTER_CONFIG} says {stated!r:.20}: they "
                "do not belong together"
            )
        try:
            alpha = float(self.alphas.value(module))
            scaling = alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)
            if not abs(scaling) <= MAX_SCALING:  # nor NaN
                raise ValueError(f"the change of {module} would be multiplied by {scaling:g}")
            return scaling
        except (TypeError, ValueError, ArithmeticError) as error:
            raise _unusable(folder, error) from error


def _read_settings(folder: Path, config: Mapping[str, Any]) -> _Settings:
    """Patterns are compiled here: there may be one for each of hundreds of modules. Raises StartError."""
    try:
        ranks, alphas = (
            _ByModule(
                config.get(key),
                [(re.compile(rf"(.*\.)?({pattern})"), value) for pattern, value in (config.get(of) or {}).items()],
            )
            for key, of in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        )
    except (AttributeError, RecursionError, OverflowError, re.error) as error:
        raise _unusable(folder, error) from error
    return _Settings(ranks, alphas, bool(config.get("use_rslora")))


def _unusable(folder: Path, error: Exception | str) -> StartError:
    return StartError(f"{folder / ADAPTER_CONFIG} cannot be used ({error}): fetch the adapter again")
