"""Weights in GGUF files, under the names of Hugging Face's checkpoints.

An index in the model's folder says where each tensor lies (`engine.checkpoint.gguf_folder` writes it). A quantized
matrix comes as the tensors of `quant.gguf`, and a quantized table of embeddings, whose rows are looked up, as float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.renamed_weights import EMBEDDING
from engine.checkpoint.weight_files import EXPERTS, GGUF_FLOATS, GgufIndex
from engine.link.errors import StartError
from quant.gguf import OFFSETS, SCALES, Q
from quant.gguf_blocks import TYPES, Unpacked, unpack_rows, widen_rows

ROWS_AT_A_TIME = 8192
"""Outputs that are unpacked together, which takes several times their memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a file."""

    path: Path
    offset: int
    type_name: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        kind = TYPES.get(self.type_name)
        if kind is None:
            return self.shape[-1] * np.dtype(GGUF_FLOATS[self.type_name][1]).itemsize
        return self.shape[-1] // kind.inputs * kind.bytes

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape[:-1]) * self.row_bytes


class GgufWeights:
    """Implements `engine.checkpoint.weights.WeightSource`."""

    def __init__(self, index: GgufIndex) -> None:
        """Raises StartError for a type that can't be run, and a file that is not as long as the index says."""
        self.files = index.files
        self._open_files = OpenFiles()
        self._parts: dict[str, tuple[_Stored, str]] = {}
        self._last: tuple[Any, Unpacked] | None = None
        ends = dict.fromkeys(self.files, 0)  # the first part of a set may have metadata alone
        for name, entry in index.tensors.items():
            stored = _stored(index.files[entry["file"]], name, entry)
            ends[stored.path] = max(ends[stored.path], stored.end)
            for matrix in _matrices(name, stored):
                self._add(*matrix)
        for path, end in ends.items():
            _refuse_cut_off(path, end)

    def _add(self, name: str, stored: _Stored) -> None:
        """Have a tensor under its name, or one that is quantized as what it is unpacked to."""
        module, _, leaf = name.rpartition(".")
        if stored.type_name in GGUF_FLOATS or name.endswith(EMBEDDING):
            self._parts[name] = stored, leaf
            return
        has_offsets = TYPES[stored.type_name].zero_point is None
        for part in (Q, SCALES, OFFSETS) if has_offsets else (Q, SCALES):
            self._parts[f"{module}.{part}"] = stored, part

    @property
    def names(self) -> Sequence[str]:
        return [*self._parts]

    def file(self, name: str) -> Path:
        return self._parts[name][0].path

    def shape(self, name: str) -> tuple[int, ...]:
        stored, part = self._parts[name]
        if part not in (SCALES, OFFSETS):
            return stored.shape
        return (stored.shape[0], stored.shape[1] // TYPES[stored.type_name].group)

    def dtype(self, name: str) -> str:
        stored, part = self._parts[name]
        if part == Q:
            return "I8"
        if stored.type_name in GGUF_FLOATS:
            return stored.type_name
        return f"F{TYPES[stored.type_name].scale_bits}" if part == SCALES else "F32"

    def read(self, name: str, index: tuple[slice, ...] = (), *, is_kept: bool = False) -> torch.Tensor:
        stored, part = self._parts[name]
        rows, columns = (*index, slice(None), slice(None))[:2]
        if stored.type_name in GGUF_FLOATS:
            return self._floats(stored, index, is_kept=is_kept)
        if part not in (Q, SCALES, OFFSETS):
            return self._widened(stored, rows)
        kind = TYPES[stored.type_name]
        inputs = kind.inputs if part == Q else kind.inputs // kind.group
        num_blocks = stored.shape[1] // kind.inputs
        first, last, _ = columns.indices(num_blocks * inputs)
        blocks = slice(first // inputs, -(-last // inputs))
        unpacked = self._unpacked(stored, rows, blocks)
        tensor = unpacked[(Q, SCALES, OFFSETS).index(part)]
        assert tensor is not None
        start = blocks.start * inputs
        return tensor[:, first - start : last - start]

    def _unpacked(self, stored: _Stored, rows: slice, blocks: slice) -> Unpacked:
        """What the blocks of some rows hold. Kept until others are read: the tensors of a matrix follow each other."""
        key = stored, rows.indices(stored.shape[0]), (blocks.start, blocks.stop)
        if self._last is None or self._last[0] != key:
            self._last = None
            size = TYPES[stored.type_name].bytes
            chunks = [
                unpack_rows(chunk[:, blocks.start * size : blocks.stop * size].contiguous(), stored.type_name)
                for chunk in self._chunks(stored, rows)
            ]
            q, scales, offsets = zip(*chunks, strict=True)
            joined = torch.cat(q), torch.cat(scales), None if offsets[0] is None else torch.cat(offsets)
            self._last = key, joined
        return self._last[1]

    def _floats(self, stored: _Stored, index: tuple[slice, ...], *, is_kept: bool) -> torch.Tensor:
        dtype_name, numbers = GGUF_FLOATS[stored.type_name]
        dtype: torch.dtype = getattr(torch, dtype_name)
        if is_kept:
            array = self._open_files.mapped(stored).view(numbers).reshape(stored.shape)[index]
        else:
            rows, *others = index or (slice(None),)
            read = self._open_files.read(stored, rows).view(numbers).reshape(-1, *stored.shape[1:])
            array = np.ascontiguousarray(read[(slice(None), *others)])
        tensor = torch.from_numpy(np.asarray(array))
        return tensor.view(dtype) if tensor.dtype != dtype else tensor

    def _widened(self, stored: _Stored, rows: slice) -> torch.Tensor:
        first, last, _ = rows.indices(stored.shape[0])
        out = torch.empty(last - first, stored.shape[1])
        done = 0
        for chunk in self._chunks(stored, rows):
            out[done : done + len(chunk)] = widen_rows(chunk, stored.type_name)
            done += len(chunk)
        return out

    def _chunks(self, stored: _Stored, rows: slice) -> Sequence[torch.Tensor]:
        """The bytes of some rows, uint8 [rows, bytes], some at a time."""
        return torch.split(torch.from_numpy(self._open_files.read(stored, rows)), ROWS_AT_A_TIME)


class OpenFiles:
    """Files that tensors are read from. Each is opened once, for there may be thousands of experts."""

    def __init__(self) -> None:
        self._files: dict[Path, BufferedReader] = {}
        self._mappings: dict[Path, np.ndarray[Any, Any]] = {}

    def mapped(self, stored: _Stored) -> np.ndarray[Any, Any]:
        """A tensor's bytes in the file's memory, for a caller that goes on to use it."""
        if stored.path not in self._mappings:
            with _in_words(stored.path):  # copy-on-write, for torch wants memory that can be written
                self._mappings[stored.path] = np.memmap(stored.path, np.uint8, "c")
        return self._mappings[stored.path][stored.offset : stored.end]

    def read(self, stored: _Stored, rows: slice) -> np.ndarray[Any, Any]:
        """A copy of the bytes of some entries of the first dimension, uint8 [rows, bytes]."""
        first, last, _ = rows.indices(stored.shape[0])
        size = (stored.end - stored.offset) // stored.shape[0]
        array = np.empty((max(0, last - first), size), np.uint8)
        with _in_words(stored.path):
            if stored.path not in self._files:
                self._files[stored.path] = file = stored.path.open("rb")
                weakref.finalize(self, file.close)
            self._files[stored.path].seek(stored.offset + first * size)
            if self._files[stored.path].readinto(array.data) < array.nbytes:
                raise StartError(f"{stored.path} was cut off while it was read: fetch the file again")
        return array


def _stored(path: Path, name: str, entry: Mapping[str, Any]) -> _Stored:
    """A tensor of `path` as the index has it. Raises StartError for one that can't be run."""
    type_name, shape = entry["type"], tuple(entry["shape"])
    if type_name not in GGUF_FLOATS and type_name not in TYPES:
        raise StartError(
            f"{path} has {name} in the type {type_name}; only {', '.join((*GGUF_FLOATS, *TYPES))} can be run: choose a "
            "file in one of them"
        )
    if len(shape) < (1 if type_name in GGUF_FLOATS else 2):
        raise StartError(f"{path} has {name} in the type {type_name}, which is no matrix: fetch the file again")
    return _Stored(path, entry["offset"], type_name, shape)


def _matrices(name: str, stored: _Stored) -> Iterator[tuple[str, _Stored]]:
    """The matrices of all experts that a tensor holds, which follow each other in the file; of others the tensor."""
    if EXPERTS not in name:
        yield name, stored
        return
    num_experts, *shape = stored.shape
    size = (stored.end - stored.offset) // num_experts
    for expert in range(num_experts):
        place = stored.offset + expert * size
        yield (
            name.replace(EXPERTS, f"{EXPERTS}{expert}."),
            dataclasses.replace(stored, offset=place, shape=tuple(shape)),
        )


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StartError.of_file(path, error) from error


def _refuse_cut_off(path: Path, size: int) -> None:
    with _in_words(path):
        actual = path.stat().st_size
    if actual < size:
        raise StartError(f"{path} is cut off: it has {actual} bytes, its tensors end at {size}: fetch the file again")
