"""Writing a quantized model's folder tensor by tensor: it is never held in memory whole."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file

from engine.link.errors import StartError
from engine.link.model_files import INDEX, NAMED_TEMPLATES

logger = logging.getLogger(__name__)

SHARD_BYTES = 4 << 30
"""Largest size of a file; that much memory is needed to write it."""
COPIED = (
    "tokenizer.json tokenizer_config.json vocab.json merges.txt added_tokens.json special_tokens_map.json "
    "generation_config.json chat_template.jinja chat_template.json processor_config.json LICENSE LICENSE.txt "
    "LICENSE.md NOTICE NOTICE.txt"
).split()
"""Files of the dense model that go with the weights; the licence holds for quantized weights, too."""


class CheckpointWriter:
    """A context that fills a new folder. An exception that leaves it removes what it wrote.

    config.json comes last: a folder without it, which a killed process leaves, is a model to no program.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._num_pending_bytes = 0
        self._shards: list[list[str]] = []
        self._num_bytes = 0
        self._written: set[Path] = set()

    def __enter__(self) -> CheckpointWriter:
        """Make the folder. Raises StartError if that fails or the folder is not empty."""
        try:
            self._is_new = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            is_empty = not any(self._folder.iterdir())
        except OSError as error:
            raise StartError(
                f"{self._folder} cannot be used as output ({error.strerror}): give another OUTPUT_DIR"
            ) from error
        if not is_empty:
            raise StartError(f"{self._folder} is not empty: give a new OUTPUT_DIR, or remove what is in it")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            return
        for path in self._written:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not there
            (self._folder / NAMED_TEMPLATES).rmdir()
        if self._is_new and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._pending and self._num_pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.cpu().contiguous()
        self._num_pending_bytes += tensor.nbytes

    def finish(self, source: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the last tensors, an index, `source`'s tokenizer and templates, and `files` as JSON, in their order."""
        self._flush()
        count = len(self._shards)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names):
            self._written.add(self._shard(number).rename(self._folder / name))
        if count > 1:
            weight_map = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
            self._write_json(INDEX, index)
        templates = sorted((source / NAMED_TEMPLATES).glob("*.jinja"))
        for path in (*(source / name for name in COPIED), *templates):
            if path.is_file():
                self._copy(path, self._folder / path.relative_to(source))
        for name, content in files.items():
            self._write_json(name, content)

    def _copy(self, path: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        self._written.add(target)
        shutil.copyfile(path, target)

    def _flush(self) -> None:
        path = self._shard(len(self._shards))
        self._written.add(path)
        path.touch()
        mode = path.stat().st_mode
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(mode)  # the library lets only the user read it, whatever the umask says
        self._shards.append([*self._pending])
        self._num_bytes += self._num_pending_bytes
        self._pending, self._num_pending_bytes = {}, 0

    def _shard(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors.part"

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._written.add(self._folder / name)
        (self._folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
