"""Weights in safetensors files; the only module that opens them. Importing it loads no torch.

Files are memory-mapped, and only the part of a tensor that is asked for is read.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from engine.link.errors import StartError, fetch_again

if TYPE_CHECKING:
    import torch


class SafetensorsWeights:
    """Implements `engine.checkpoint.weights.WeightSource`. One file is open at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._open_file: _OpenFile | None = None

    @property
    def names(self) -> list[str]:
        return [*self._file_of]

    def file(self, name: str) -> Path:
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        with self._opened(name) as file:
            return tuple(file.kept.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        with self._opened(name) as file:
            return str(file.kept.get_slice(name).get_dtype())

    def read(self, name: str, index: tuple[slice, ...] = (), *, is_kept: bool = False) -> torch.Tensor:
        with self._opened(name) as file:
            tensor: torch.Tensor = file.kept.get_slice(name)[index] if is_kept else file.read_dropped(name, index)
            return tensor

    @functools.cached_property
    def _file_of(self) -> dict[str, Path]:
        file_of: dict[str, Path] = {}
        for path in self.files:
            with _in_words(path):
                file_of |= dict.fromkeys(_open(path).keys(), path)
        return file_of

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[_OpenFile]:
        path = self._file_of[name]
        with _in_words(path):
            if self._open_file is None or self._open_file.path != path:
                self._open_file = _OpenFile(path)
            yield self._open_file


class _OpenFile:
    """Two mappings of one file.

    Tensors used in place keep `kept` alive. The pages touched by copying belong to the other mapping, which is given up
    and made anew after every `LIMIT_BYTES`, so that they do not count as this process's memory afterwards.
    """

    LIMIT_BYTES = 64 << 20

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = _open(path)
        self._dropped = _open(path)
        self._num_bytes = 0

    def read_dropped(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A tensor that the caller copies."""
        if self._num_bytes > self.LIMIT_BYTES:
            self._dropped = _open(self.path)
            self._num_bytes = 0
        stored = self._dropped.get_slice(name)
        tensor: torch.Tensor = stored[index]
        shape = stored.get_shape()
        if index:  # no page of other rows is touched
            shape = [len(range(*index[0].indices(shape[0]))), *shape[1:]]
        self._num_bytes += math.prod(shape) * tensor.element_size()
        return tensor


def _open(path: Path, framework: str = "pt") -> Any:
    return safe_open(path, framework=framework)


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Raise StartError in place of the library's and the system's errors."""
    try:
        yield
    except SafetensorError as error:
        raise StartError(f"{path} is not a whole safetensors file ({error}): {fetch_again(path)}") from error
    except OSError as error:
        raise StartError.of_file(path, error) from error


def damage(path: Path) -> str | None:
    """Why the file can't be read; None: it can. The header is compared with the size of the file, no tensor is read."""
    try:
        _open(path, "numpy")
    except (SafetensorError, OSError) as error:
        return str(error)
    return None
