"""safetensors -> the layers of a model. Files are memory-mapped; what a layer can use in place is not copied, and of
what it needs a part of only that part is read.

Every tensor that is used is also looked through for NaN and infinity, on a thread beside the one that copies: where a
second core is free it costs no time, as it brings in pages of the tensors used in place that the warm-up would touch.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoint.files import safetensors_files
from engine.link.errors import StartError
from engine.memory import release_freed_memory
from engine.models.base import CausalLM, Loadable

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 1.0

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def find_tensors(folder: Path) -> dict[str, Path]:
    """Names of all tensors in the folder's files, with the file of each. Raises StartError if one is not whole."""
    found: dict[str, Path] = {}
    for path in safetensors_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise _not_whole(path, error) from error
        except OSError as error:
            raise StartError.of_file(path, error) from error
    return found


def _not_whole(path: Path, error: SafetensorError) -> StartError:
    return StartError(f"{path} is not a whole safetensors file ({error}): fetch the model again")


def load_weights(model: CausalLM, folder: Path, device: torch.device, num_shards: int = 1) -> None:
    """Fill every layer of `model` from the folder's files. Raises StartError naming the tensor that does not fit.

    `num_shards`: the layers take about one of so many parts.
    """
    layers = model.checkpoint_layers()
    files = safetensors_files(folder)
    progress = _Progress(sum(path.stat().st_size for path in files) // num_shards)
    checks: list[Future[None]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="finite") as checker:

        def on_loaded(path: Path, name: str, tensor: torch.Tensor) -> None:
            if tensor.is_floating_point():
                checks.append(checker.submit(_refuse_non_finite, path, name, tensor))
            progress.add(tensor.nbytes)

        for order_tensors_first, path in itertools.product((True, False), files):
            names = partial(_is_wanted, order_tensors_first=order_tensors_first, is_ignored=model.is_ignored)
            try:
                _load_file(path, layers, names, on_loaded)
            except SafetensorError as error:
                raise _not_whole(path, error) from error
            except OSError as error:
                raise StartError.of_file(path, error) from error
    for check in checks:
        check.result()
    for prefix, (layer, part) in layers.items():
        if missing := layer.missing(part):
            raise StartError(f"{folder} lacks the tensor {prefix}.{missing[0]}: the checkpoint is not complete")
    for prefix, layer in {id(layer): (prefix, layer) for prefix, (layer, _) in layers.items()}.values():
        try:
            layer.finish(device)
            release_freed_memory()
        except ValueError as error:
            raise StartError(f"{prefix} cannot be run: {error}") from error


def _is_wanted(name: str, *, order_tensors_first: bool, is_ignored: Callable[[str], bool]) -> bool:
    """Tensors that tell the order of a matrix's inputs come first (`order_tensors_first`): the cut depends on them."""
    return name.endswith("g_idx") is order_tensors_first and not is_ignored(name)


def _load_file(
    path: Path,
    layers: dict[str, tuple[Loadable, int]],
    is_wanted: Callable[[str], bool],
    on_loaded: Callable[[Path, str, torch.Tensor], None],
) -> None:
    # Two mappings of the file: tensors used in place keep one of them alive; the pages touched by copying belong to
    # the other, one layer at a time, so that they do not count as this process's memory afterwards.
    with safe_open(path, framework="pt") as kept, _Reopened(path) as copied:
        for name in kept.keys():  # safe_open is not a mapping
            prefix, _, leaf = name.rpartition(".")
            if not is_wanted(name):
                continue
            if prefix not in layers:
                raise StartError(f"{path.name} has a tensor {name} that the model does not know")
            layer, part = layers[prefix]
            piece = kept.get_slice(name)
            dtype = TORCH_DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise StartError(
                    f"tensor {name} is stored as {piece.get_dtype()}: only {', '.join(TORCH_DTYPES)} are loaded"
                )
            try:
                cut = layer.cut(leaf, part, piece.get_shape())
                index = (slice(None),) if cut is None else (*[slice(None)] * cut[0], cut[1])
                tensor = copied.read(name, index) if layer.is_copied(leaf, part, dtype) else piece[index]
                layer.load(leaf, part, tensor)
            except KeyError:
                raise StartError(f"{path.name} has a tensor {name} that the model does not know") from None
            except ValueError as error:
                raise StartError(
                    f"tensor {name} {error}: config.json and the weights do not belong together"
                ) from error
            on_loaded(path, name, tensor)


def _refuse_non_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    # The sum takes one fast pass and is not finite if any value isn't; sums of finite values may overflow, though.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise StartError(f"{path} has a tensor {name} with NaN or infinite values: fetch the model again")


class _Reopened:
    """A mapping of the file that is given up and made anew after every `LIMIT_BYTES` read through it."""

    LIMIT_BYTES = 64 << 20

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_bytes = 0

    def __enter__(self) -> _Reopened:
        handle: Any = safe_open(self._path, framework="pt")
        self._file = handle.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(None, None, None)

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        if self._num_bytes > self.LIMIT_BYTES:
            self.__exit__()
            self.__enter__()
            self._num_bytes = 0
        piece = self._file.get_slice(name)
        tensor: torch.Tensor = piece[index]
        self._num_bytes += math.prod(piece.get_shape()) * tensor.element_size()
        return tensor


class _Progress:
    """Logs how much is loaded, at most once a second."""

    def __init__(self, total_bytes: int) -> None:
        self._total = max(total_bytes, 1)
        self._done = 0
        self._next_time = time.monotonic() + PROGRESS_INTERVAL_S

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if time.monotonic() >= self._next_time:
            self._next_time = time.monotonic() + PROGRESS_INTERVAL_S
            share = 100 * self._done / self._total
            logger.info("Loading weights: %.0f %% of %.2f GB", share, self._total / 1e9)
