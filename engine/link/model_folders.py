"""Refusals of what is no model: each kind of it has a sentence that says what it is and what to do.

The launcher asks before it starts a process, and the download before and after it fetches. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from urllib.parse import urlsplit

from engine.link.errors import StartError
from engine.link.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GGUF,
    INDEX,
    is_adapter,
    is_weight_name,
    names_in,
    read_file,
)
from engine.link.suggestions import suggestion

BUCKET_SCHEME = "gs://"
"""The beginning of the address of a folder in Google's Cloud Storage."""
PICKLED = (".bin", ".pt", ".pth")
_GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
POINTER_START = b"version https://git-lfs"
MAX_POINTER_BYTES = 1024
"""A pointer of Git LFS, which stands in place of a file that was not fetched, is smaller."""
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_FILE = re.compile(r"\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)+")
"""What names a file of a model on the Hub, if it is no path."""


MODEL, ADAPTER = "a model", "an adapter (LoRA)"
"""What an id may be of, in a refusal's words."""


def refuse_other_paths(model_id: str, kind: str = MODEL) -> None:
    """Raise StartError for what is no folder, no address of a bucket, and cannot be an id on the Hub either.

    `kind`: what the id would be of.
    """
    if model_id.startswith(BUCKET_SCHEME):
        return
    if model_id.startswith(("http://", "https://")):
        owner_and_name = "/".join(urlsplit(model_id).path.split("/")[1:3])
        raise StartError(f"{model_id} is an address: give the model's id, like {owner_and_name or 'Qwen/Qwen2.5-0.5B'}")
    if os.path.isfile(model_id):
        if model_id.endswith(GGUF):
            raise StartError(
                f"{model_id} is a GGUF file, and only a server reads those: give a folder with safetensors"
            )
        raise StartError(f"{model_id} is a file: give the folder that it lies in, {Path(model_id).parent}")
    if os.path.islink(model_id) and not os.path.exists(model_id):
        raise StartError(f"{model_id} is a link to {os.readlink(model_id)}, which does not exist: correct the link")
    if model_id.endswith(GGUF) and kind == MODEL:
        _refuse_missing_gguf(model_id)
    if not _HUB_ID.fullmatch(model_id):
        suggested = folder_suggestion(model_id)
        raise StartError(
            f"{model_id!r} is neither a folder nor the id of {kind} on the Hub{suggested}: check the path or the id"
        )


def _refuse_missing_gguf(path: str) -> None:
    """Raise StartError for the path of a GGUF file that is not there. OWNER/NAME may be a model on the Hub."""
    parent = os.path.dirname(path)
    has_parent = os.path.isdir(os.path.expanduser(parent or "."))
    if not has_parent and _HUB_FILE.fullmatch(path):
        owner, repository, file = path.split("/", 2)
        raise StartError(
            f"{path} is no file here: fetch it with `hf download {owner}/{repository} {file} --local-dir .`, and give "
            "the path of the file"
        )
    if has_parent or not _HUB_ID.fullmatch(path):
        suggested = gguf_suggestion(path)
        raise StartError(
            f"there is no file {path}{suggested}: a model in GGUF is given by the path of its file, check the path"
        )


def gguf_files(model_id: str) -> list[Path]:
    """The GGUF files of a model, in order: one, the parts of a split one, or those in a folder without other weights.

    Empty: `model_id` names no such model. Raises StartError for a folder with several models, and for missing parts.
    """
    path = Path(model_id)
    if model_id.endswith(GGUF) and os.path.isfile(model_id):
        return _gguf_set(path)
    if not os.path.isdir(model_id):  # Path would take an empty text for the working directory
        return []
    names = names_in(path)
    files = sorted(path / name for name in names if name.endswith(GGUF) and not name.startswith("."))
    if not files or INDEX in names or any(map(is_weight_name, names)):
        return []
    whole = _gguf_set(files[0])
    if others := [file.name for file in files if file not in whole]:
        raise StartError(
            f"{model_id} has several models in GGUF, {whole[0].name} and {others[0]} among them: give the path of one"
        )
    return whole


def _gguf_set(path: Path) -> list[Path]:
    """All parts of the model that a file is of. Raises StartError if one is not there."""
    match = _GGUF_PART.fullmatch(path.name)
    if match is None:
        return [path]
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    for part in parts:
        if not part.is_file():
            raise StartError(f"{part} is missing: {path.name} is one of {int(match[3])} parts, fetch them all")
    return parts


def folder_suggestion(model_id: str) -> str:
    """` (did you mean X?)` with the folder whose name is nearest; empty if there is none."""
    return _suggestion(model_id, os.DirEntry.is_dir)


def gguf_suggestion(path: str) -> str:
    """` (did you mean X?)` with the nearest GGUF file of its folder; empty if there is none."""
    return _suggestion(path, lambda entry: entry.name.endswith(GGUF))


def _suggestion(model_id: str, is_candidate: Callable[[os.DirEntry[str]], bool]) -> str:
    path = os.path.expanduser(model_id).rstrip("/")  # a quoted ~ comes as it is
    parent, name = os.path.split(path)
    try:
        names = [entry.name for entry in os.scandir(parent or ".") if is_candidate(entry)]
    except (OSError, ValueError):
        return ""
    return suggestion([name], names, os.path.join(parent or ".", ""))


def refuse_no_model(folder: Path) -> None:
    """Raise StartError for a local folder in which a model, or an adapter, lacks something, by its names alone."""
    names = names_in(folder)
    if "config.json" not in names and not is_adapter(names):
        _refuse_parent(folder)
    refuse_names(names, str(folder))
    for name in names:
        if name.endswith((".safetensors", ".json")):
            _refuse_pointer(folder / name)
    if not is_adapter(names):
        refuse_missing_tokenizer(folder)


def refuse_names(names: Collection[str], model_id: str) -> None:
    """Raise StartError if files of these names, at the top of a folder, can't make a model that we serve."""
    if all(name.startswith(".") for name in names):
        raise StartError(f"{model_id} is empty: give a folder with a model in it, or the id of one on the Hub")
    is_adapted = is_adapter(names)
    weights = [name for name in names if (name == ADAPTER_WEIGHTS if is_adapted else is_weight_name(name))]
    if not weights and INDEX not in names:
        _refuse_other_weights(names, model_id)
    if "config.json" not in names and not is_adapted:
        raise StartError(
            f"{model_id} has weights but no config.json: a model is a folder with config.json, tokenizer.json and the "
            "weights, fetch all of its files"
        )


def refuse_no_adapter_folder(folder: Path) -> None:
    """Raise StartError for a folder of an adapter that is not there."""
    if os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        return
    if folder.is_absolute():
        raise StartError(f"there is no folder {folder} on the server's machine: check the path")
    raise StartError(
        f"there is no folder {folder} where the server runs: give the absolute path of a folder on the server's "
        "machine; an id on the Hub goes into --lora-adapters at the start"
    )


def refuse_no_adapter(names: Collection[str], place: str) -> None:
    """Raise StartError if files of these names are no adapter (LoRA); other files beside them do not matter."""
    if ADAPTER_CONFIG not in names:
        raise StartError(f"{place} has no {ADAPTER_CONFIG}: an adapter (LoRA) is a folder with it, as peft writes")
    if ADAPTER_WEIGHTS not in names:
        raise StartError(
            f"{place} has no {ADAPTER_WEIGHTS}, and pickled weights (.bin), which can run code, are never loaded: "
            "save it once more with `peft`, save_pretrained(...)"
        )


def refuse_missing_tokenizer(folder: Path) -> None:
    """Raise StartError if the folder has no tokenizer.json."""
    if not (folder / "tokenizer.json").exists():  # what is there and is no file has a sentence of its own
        raise StartError(
            f"{folder} has no tokenizer.json: fetch it from the place that the model is from, or write one with "
            "`transformers`, AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def _refuse_other_weights(names: Collection[str], model_id: str) -> None:
    if any(name.endswith(PICKLED) for name in names):
        raise StartError(
            f"{model_id} has only pickled weights (.bin, .pt), which can run code and are never loaded: give a "
            "--revision with safetensors (the Hub's convert space opens such a refs/pr/N), or convert them on a "
            "machine you trust, with `transformers`, save_pretrained(..., safe_serialization=True)"
        )
    if any(name.endswith(GGUF) for name in names):
        raise StartError(
            f"{model_id} has no *.safetensors file but GGUF: fetch one of those files, and give its path as --model-id"
        )
    if "config.json" in names or "tokenizer.json" in names:
        raise StartError(
            f"{model_id} has no *.safetensors file, the weights are missing: fetch all of the model's files"
        )
    raise StartError(f"{model_id} has no *.safetensors file and no config.json: it is no model, check --model-id")


def _refuse_parent(folder: Path) -> None:
    """Raise StartError if the model is in a folder below, also as the Hub's cache keeps its own."""
    for pattern in ("*/config.json", "snapshots/*/config.json"):
        for path in sorted(folder.glob(pattern)):
            raise StartError(f"{folder} has no config.json, but a folder in it has: give --model-id {path.parent}")


def _refuse_pointer(path: Path) -> None:
    """Raise StartError for a pointer of Git LFS."""
    try:
        is_small = path.is_file() and path.stat().st_size <= MAX_POINTER_BYTES
    except OSError as error:
        raise StartError.of_file(path, error) from error
    if is_small and (read_file(path) or b"").startswith(POINTER_START):
        raise StartError(
            f"{path} is cut off or damaged: a pointer of Git LFS stands in its place, run `git lfs pull` in that folder"
        )
