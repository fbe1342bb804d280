"""The choice of the files that hold a model, out of all that lie in its folder. Importing it loads no torch.

Trainers leave adapters, optimizers and older copies beside a model, and other systems leave files of their own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.link.errors import StartError
from engine.link.model_files import GGUF_INDEX, INDEX, WEIGHTS, is_weight_name, names_in, read_json

WHOLE = "model.safetensors"
SECOND_COPIES = ("consolidated",)
"""Beginnings of the names under which some publishers add the same weights once more, for other programs."""
GGUF_FLOATS = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<i2")}
"""A type of GGUF that is not quantized -> torch's name of its numbers, and NumPy's of their bits. The widest first."""
EXPERTS = ".mlp.experts."
"""In the name of a tensor of GGUF that holds one matrix of every expert of a layer, [experts, outputs, inputs]."""
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclasses.dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that are loaded, in order, and the names of those that lie beside them."""

    paths: Sequence[Path]
    others: Sequence[str]


@dataclasses.dataclass(frozen=True, slots=True)
class GgufIndex:
    """Where tensors lie in GGUF files."""

    files: Sequence[Path]
    tensors: Mapping[str, Mapping[str, Any]]
    """Name -> `file`, a place in `files`; `offset` in bytes; `type`; `shape`."""


def read_gguf_index(folder: Path) -> GgufIndex | None:
    """The index of a folder whose weights are in GGUF files; None: they are not. Raises StartError."""
    index = read_json(folder / GGUF_INDEX)
    return GgufIndex([folder / name for name in index["files"]], index["tensors"]) if index else None


def find_weight_files(folder: Path) -> WeightFiles:
    """The weight files of a model. Raises StartError when there are none or one that is needed is missing."""
    if (gguf := read_gguf_index(folder)) is not None:
        return WeightFiles(gguf.files, [])
    names = sorted(name for name in names_in(folder) if name.endswith(WEIGHTS))
    chosen = choose_weight_names(folder, names)
    for name in chosen:
        if not _is_file(folder / name):
            raise StartError(f"{folder / name} is no file, or a link to a missing one: fetch the model again")
    return WeightFiles([folder / name for name in chosen], [name for name in names if name not in chosen])


def choose_weight_names(folder: Path, names: Collection[str]) -> list[str]:
    """The model's weight files among `names`, those that are there or can be fetched. Raises StartError.

    A whole model.safetensors counts before everything else, as in `transformers`; then what the folder's index names,
    unless nothing of that is there.
    """
    if WHOLE in names:
        return [WHOLE]
    index = read_json(folder / INDEX)
    chosen = _indexed(folder, index) if index else []
    if not any(name in names for name in chosen):  # there is no index, or it is that of another model
        chosen = _unindexed(names) or chosen
    for name in chosen:
        if name not in names:
            raise StartError(f"{folder / name} is named by {INDEX} but missing: fetch the model again")
    if not chosen:
        raise StartError(f"{folder} has no *.safetensors file and no *.gguf: other weights are not loaded")
    return chosen


def _indexed(folder: Path, index: dict[str, object]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise StartError(f"{folder}/{INDEX} has no weight_map of file names: fetch the model again")
    for name in weight_map.values():
        if name in ("", "..") or name != Path(name).name or "\0" in name:  # others would lead out of the folder
            raise StartError(
                f"{folder}/{INDEX} names {name!r}, which is no file of this folder: fetch the model from a place that "
                "you trust"
            )
    return sorted(set(weight_map.values()))


def _unindexed(names: Collection[str]) -> list[str]:
    """The model among files that no index names: the parts of one whole, or else all that may hold weights."""
    candidates = sorted(name for name in names if is_weight_name(name))
    first_copies = [name for name in candidates if not name.startswith(SECOND_COPIES)]
    parts: dict[tuple[str, str], list[str]] = {}
    for name in first_copies:
        if match := _PART.fullmatch(name):
            parts.setdefault((match[1], match[3]), []).append(name)
    whole = [part for (_, count), part in parts.items() if len(part) == int(count)]
    return whole[0] if len(whole) == 1 else first_copies or candidates


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise StartError.of_file(path, error) from error
