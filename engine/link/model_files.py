"""Reading the files of a model's folder, which somebody else has written. Standard library only.

A folder may hold a fifo that nobody writes to, or a link to a device that never ends: none of them is opened.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from engine.link.errors import StartError, fetch_again

MAX_FILE_BYTES = 256 << 20
"""Largest file that is read whole. The largest tokenizers have about 40 MB."""

WEIGHTS, INDEX = ".safetensors", "model.safetensors.index.json"
TEXT_ENDINGS = (".json", ".txt", ".jinja")
"""Endings of configuration, tokenizer and chat templates."""
STRAY_WORDS = "arguments args training trainer optimizer scheduler rng_state".split()
"""A file with one of these words in its name is a trainer's, not a part of the model."""
NAMED_TEMPLATES = "additional_chat_templates"
"""The folder in a model's folder whose files `NAME.jinja` are further chat templates."""
GGUF, GGUF_INDEX = ".gguf", "gguf_index.json"
"""The ending of GGUF files, and what says where tensors lie in them (`engine.checkpoint.gguf_folder`)."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterBase(NamedTuple):
    """The model that an adapter changes."""

    model_id: str
    """A folder, or an id on the Hub."""
    revision: str | None


def names_in(folder: Path) -> list[str]:
    """The names of all that lies in a folder. Raises StartError."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError as error:
        raise StartError.of_file(folder, error) from error


def read_file(path: Path, max_bytes: int | None = None) -> bytes | None:
    """The content of `path`; None: there is no such file. Raises StartError for what is no file of a usual size.

    A file has at most `max_bytes`; None: as many as any file of a model.
    """
    max_bytes = max_bytes or MAX_FILE_BYTES
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # opening a folder says what it is
            raise StartError(f"{path} is no regular file, or a link to none: {fetch_again(path)}")
        if status.st_size > max_bytes:
            raise StartError(f"{path} is larger than {max_bytes >> 20} MiB: {fetch_again(path)}")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)  # files of /proc have no size, and may not end
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StartError.of_file(path, error) from error
    if len(content) > max_bytes:
        raise StartError(f"{path} is larger than {max_bytes >> 20} MiB: {fetch_again(path)}")
    return content


def read_json(path: Path, max_bytes: int | None = None) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file; `max_bytes` as in `read_file`.

    Raises StartError when it can't be read.
    """
    text = read_file(path, max_bytes)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StartError(f"{path} cannot be read ({error}): {fetch_again(path)}") from error
    if not isinstance(content, dict):
        raise StartError(f"{path} is not a JSON object: {fetch_again(path)}")
    return content


def is_weight_name(name: str) -> bool:
    """Whether a file of that name may hold weights of a model: no trainer's, no adapter's, no hidden file."""
    is_stray = any(word in name for word in STRAY_WORDS) or name.startswith(("adapter_", "."))
    return name.endswith(WEIGHTS) and not is_stray


def is_adapter(names: Collection[str]) -> bool:
    """Whether files of these names are an adapter alone, without the model that it changes."""
    return ADAPTER_CONFIG in names and not any(map(is_weight_name, names))


def adapter_base(folder: Path) -> AdapterBase | None:
    """The model that the adapter in `folder` changes; None: the folder holds no adapter. Raises StartError."""
    if not is_adapter(names_in(folder)):
        return None
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    model_id, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(model_id, str) or not model_id:
        raise StartError(f"{path} does not name its model: put its folder or id there as base_model_name_or_path")
    return AdapterBase(model_id, revision if isinstance(revision, str) and revision else None)
