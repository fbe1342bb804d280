"""An adapter (LoRA) merged into its base model while the weights are read. Importing it loads no torch.

A matrix W [outputs, inputs] becomes W + scaling * B @ A, with A [r, inputs] and B [outputs, r], as `peft` merges it, in
float32: --dtype float32 gives the ids of the merged model, whatever the base model is stored in. Tensors that were
trained whole take the place of the base model's.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.adapter_config import MERGE_WITH_PEFT, AdapterSettings, read_config, read_settings, unusable
from engine.checkpoint.expert_changes import SplitExpertChanges
from engine.checkpoint.files import count_tokens
from engine.checkpoint.renamed_weights import DECODER, EMBEDDING, HEAD
from engine.checkpoint.safetensors_weights import SafetensorsWeights
from engine.checkpoint.weights import open_weights
from engine.link.errors import StartError
from engine.link.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from engine.link.model_folders import refuse_no_adapter, refuse_no_adapter_folder
from quant.matching_time import MatchingTime

if TYPE_CHECKING:
    import torch

    from engine.checkpoint.weights import WeightSource

logger = logging.getLogger(__name__)

_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
"""A tensor of an adapter. Groups: the module, whether that is a table of embeddings, A or B."""
_BIAS = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_B(?:\.default)?\.bias")
"""The change of a bias. Group: the module."""
_SAVED = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.(weight|bias)")
"""A tensor that was trained whole. Groups: the module, the tensor's own name."""
_COPY = re.compile(r"(?:base_model\.model\.)?((?:.+\.)?(?:embed_tokens|lm_head))(?:\.base_layer)?\.weight")
"""A tensor of the base model that `peft` saves along where embeddings are targets, were resized, or are asked for
(`save_embedding_layers`). Group: the module."""
COPIED_ROWS = 8192
"""Rows of such a tensor that are compared at a time."""
DTYPES = ("F32", "F16", "BF16")
TABLE, HEAD_WEIGHT = f"{DECODER}{EMBEDDING}", f"{HEAD}weight"


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Changes:
    """What an adapter's files say, each change by the name of the base model's tensor."""

    settings: AdapterSettings
    adapter: WeightSource
    matrices: dict[str, _Update]
    biases: dict[str, tuple[str, float]]
    """The tensor that is added, and its factor."""
    saved: dict[str, str]
    """The tensor that takes the place of the base model's."""


class MergedWeights:
    """Implements `engine.checkpoint.weights.WeightSource` by a base model and an adapter."""

    def __init__(self, base: WeightSource, base_folder: Path, folder: Path, *, is_tied: bool = False) -> None:
        """`folder` is the adapter's. `is_tied`: config.json says that the table of embeddings is the head.

        Raises StartError if the adapter does not fit the base model or can't be merged.
        """
        self._base = base
        self._changes = changes = _read_changes(folder)
        self.files = [*base.files, *changes.adapter.files]
        self.names = [*base.names]
        if is_tied:
            self._part_tied(folder)
        self._check_names(folder)
        for name, update in changes.matrices.items():
            self._check_update(folder, name, update)
        for name, stored in (*changes.saved.items(), *((name, bias) for name, (bias, _) in changes.biases.items())):
            if changes.adapter.shape(stored) != self.shape(name):
                raise StartError(
                    f"{folder} has {stored} {list(changes.adapter.shape(stored))}, and its base model has {name} "
                    f"{list(self.shape(name))}: {MERGE_WITH_PEFT}"
                )
        _refuse_changed_copies(changes, base, base_folder)

    def _part_tied(self, folder: Path) -> None:
        """Have a head beside the table of embeddings where the adapter changes either: the other stays as it was."""
        changes = self._changes
        changed = {*changes.matrices, *changes.saved} & {TABLE, HEAD_WEIGHT}
        if len(changed) == 1 and changes.settings.is_tying:
            raise StartError(f"{folder} changes {changed.pop()} for the table and the head: {MERGE_WITH_PEFT}")
        if changed and HEAD_WEIGHT not in self.names:
            self.names.append(HEAD_WEIGHT)

    def _check_names(self, folder: Path) -> None:
        changes, names = self._changes, set(self.names)
        for name in self.changed_names:
            if name not in names and name in changes.biases:
                raise StartError(
                    f"{folder} adds {name}, and its base model's matrix has no bias: train it without lora_bias"
                )
            if name not in names:
                raise StartError(
                    f"{folder} changes {name}, which its base model does not have: give the adapter the model that it "
                    f"was made for, in {ADAPTER_CONFIG}"
                )
        for module in changes.settings.saved_modules:
            is_there, is_saved = (any(f"{module}." in name for name in group) for group in (names, changes.saved))
            if is_there and not is_saved:
                raise StartError(f"{folder} lacks {module}, which modules_to_save names: fetch the adapter again")

    @property
    def changed_names(self) -> Sequence[str]:
        """The tensors that the adapter changes."""
        return [*self._changes.matrices, *self._changes.biases, *self._changes.saved]

    def _base_name(self, name: str) -> str:
        return TABLE if name == HEAD_WEIGHT and name not in self._base.names else name

    def file(self, name: str) -> Path:
        return self._base.file(self._base_name(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(self._base_name(name))

    def dtype(self, name: str) -> str:
        changes = self._changes
        if name in changes.saved:
            return changes.adapter.dtype(changes.saved[name])
        is_sum = name in changes.matrices or name in changes.biases
        return "F32" if is_sum else self._base.dtype(self._base_name(name))

    def read(self, name: str, index: tuple[slice, ...] = (), *, is_kept: bool = False) -> torch.Tensor:
        changes, base_name = self._changes, self._base_name(name)
        if name in changes.saved:
            return changes.adapter.read(changes.saved[name], index, is_kept=is_kept)
        if name in changes.matrices:
            rows, columns = (*index, slice(None), slice(None))[:2]
            change = changes.matrices[name].part(changes.adapter, rows, columns)
            return self._base.read(base_name, index).float() + change
        if name in changes.biases:
            bias, scaling = changes.biases[name]
            return self._base.read(name, index).float() + changes.adapter.read(bias, index).float() * scaling
        return self._base.read(base_name, index, is_kept=is_kept)

    def _check_update(self, folder: Path, name: str, update: _Update) -> None:
        adapter = self._changes.adapter
        a, b, shape = adapter.shape(update.a), adapter.shape(update.b), self.shape(name)
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
        self.folder = folder
        self._changes = changes = _read_changes(folder)
        if others := [*changes.saved, *changes.biases, *changes.settings.saved_modules]:
            raise StartError(
                f"{folder} changes {others[0]}, and beside the model only the matrices of its layers can be changed: "
                "give the adapter as --model-id, which merges it, or merge it with `peft`"
            )
        self._weights = changes.adapter
        self._updates = {name.removesuffix(".weight"): update for name, update in changes.matrices.items()}

    @property
    def fix(self) -> str:
        """The end of the refusal of an adapter that was made for another model."""
        base_model = self._changes.settings.base_model
        if base_model is None:
            return "it was made for another one"
        return f"it says that it was made for {base_model!r}, serve that or give an adapter of this model"

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

    def refuse_changed_copies(self, base: Path, beat: Callable[[], None] = lambda: None) -> None:
        """Raise StartError for an adapter with tensors of a base model that are not those in the folder `base`.

        `beat` is called after each part that is read.
        """
        if any(map(_COPY.fullmatch, self._weights.names)):
            _refuse_changed_copies(self._changes, open_weights(base), base, beat)

    def read(self, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A, B and the factor of their product."""
        update = self._updates[module]
        a, b = (self._weights.read(name, is_kept=True) for name in (update.a, update.b))
        return a, b, update.scaling


def _read_changes(folder: Path) -> _Changes:
    """What the adapter's files say. Raises StartError for an adapter of another kind."""
    files = ADAPTER_CONFIG, ADAPTER_WEIGHTS
    refuse_no_adapter_folder(folder)
    # Path.is_file raises for a name that is too long.
    refuse_no_adapter([name for name in files if os.path.isfile(folder / name)], str(folder))
    config = read_config(folder)
    settings = read_settings(folder, config)
    matching_time = MatchingTime(functools.partial(unusable, folder))

    def rank_of(parameter: str) -> Any:
        with matching_time:
            return settings.ranks.value(parameter)

    @functools.cache  # all experts of a layer have one
    def scaling_of(parameter: str, rank: int) -> float:
        with matching_time:
            return settings.scaling(parameter, rank=rank)

    adapter = SplitExpertChanges(SafetensorsWeights([folder / ADAPTER_WEIGHTS]), settings, config, rank_of)
    tensors = _sort_tensors(folder, settings, adapter)
    matrices = {}
    for module, halves in tensors.halves.items():
        if halves.keys() != {"A", "B"}:
            raise StartError(f"{folder} has only one half of the change of {module}: fetch the adapter again")
        for name in halves.values():
            _check_stored(folder, name, adapter)
        scaling = scaling_of(adapter.parameter(module), adapter.shape(halves["A"])[0])
        matrices[f"{module}.weight"] = _Update(halves["A"], halves["B"], scaling, module in tensors.embeddings)
    biases = {f"{module}.bias": (name, matrices[f"{module}.weight"].scaling) for module, name in tensors.biases.items()}
    if not matrices and not tensors.saved:
        raise StartError(f"{folder / ADAPTER_WEIGHTS} has no tensors: save the adapter once more with `peft`")
    return _Changes(settings, adapter, matrices, biases, tensors.saved)


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of an adapter by what they are."""

    halves: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    """Module -> the names of its A and B."""
    embeddings: set[str] = dataclasses.field(default_factory=set)
    """The modules of them that are tables of embeddings."""
    biases: dict[str, str] = dataclasses.field(default_factory=dict)
    """Module -> the name of what is added to its bias."""
    saved: dict[str, str] = dataclasses.field(default_factory=dict)
    """A tensor of the base model -> the name of what takes its place."""


def _sort_tensors(folder: Path, settings: AdapterSettings, adapter: WeightSource) -> _Tensors:
    """Raises StartError for a tensor that is none of an adapter, and for two changes of one matrix."""
    tensors = _Tensors()
    for name in adapter.names:
        if match := _TENSOR.fullmatch(name):
            halves = tensors.halves.setdefault(match[1], {})
            is_other_kind = bool(halves) and bool(match[2]) != (match[1] in tensors.embeddings)
            if match[3] in halves or is_other_kind:  # the same module under names of two kinds
                raise _twice(folder, name, next(iter(halves.values())), match[1])
            halves[match[3]] = name
            if match[2]:
                tensors.embeddings.add(match[1])
        elif match := _BIAS.fullmatch(name):
            tensors.biases[match[1]] = name
        elif (match := _SAVED.fullmatch(name)) and settings.is_saved(match[1], match[2]):
            place = f"{match[1]}.{match[2]}"
            if place in tensors.saved:
                raise _twice(folder, name, tensors.saved[place], match[1])
            tensors.saved[place] = name
        elif not _COPY.fullmatch(name):
            raise StartError(f"{folder} has a tensor {name}, which is no part of a LoRA: merge the adapter with `peft`")
    for module, halves in tensors.halves.items():
        if saved := tensors.saved.get(f"{module}.weight"):
            raise _twice(folder, saved, next(iter(halves.values())), module)
    for module, name in tensors.biases.items():
        if saved := tensors.saved.get(f"{module}.bias"):
            raise _twice(folder, saved, name, module)
    with_bias = tensors.halves.keys() - tensors.embeddings if settings.has_biases else set()
    if halved := sorted(tensors.biases.keys() - tensors.halves.keys() or with_bias - tensors.biases.keys()):
        raise StartError(f"{folder} has only one half of the change of {halved[0]}: fetch the adapter again")
    for name in (*tensors.biases.values(), *tensors.saved.values()):
        if adapter.dtype(name) not in DTYPES:
            raise StartError(
                f"{folder} has {name} as {adapter.dtype(name)}, and only {', '.join(DTYPES)} are merged: save it once "
                "more with `peft`"
            )
    return tensors


def _twice(folder: Path, name: str, other: str, module: str) -> StartError:
    return StartError(
        f"{folder} has {name} and {other}, two changes of {module}: save the adapter once more with `peft`"
    )


def _refuse_changed_copies(
    changes: _Changes, base: WeightSource, base_folder: Path, beat: Callable[[], None] = lambda: None
) -> None:
    """Raise StartError for a table of embeddings or a head that was saved along and is not the base model's own."""
    adapter, folder = changes.adapter, changes.settings.folder
    for name in adapter.names:
        match = _COPY.fullmatch(name)
        if match and name not in changes.saved.values():
            is_tied = not any(stored.startswith(f"{match[1]}.") for stored in base.names)
            stored = TABLE if is_tied else f"{match[1]}.weight"
            if not _is_copy(adapter, name, base, stored, beat):
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


def _is_copy(adapter: WeightSource, name: str, base: WeightSource, stored: str, beat: Callable[[], None]) -> bool:
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
        beat()
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
