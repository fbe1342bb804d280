"""Weights -> the layers of a model. Tensors that a layer can use in place are not copied, and only the part of a tensor
that a layer needs is read.

Tensors come layer by layer, and a layer goes to another device as soon as its last tensor is there: the host holds the
matrices of one layer at a time, however large the model is. Layers that stay in the host's memory are finished together
at the end: matrices that are packed one by one between the tensors lie so in memory that a prompt in 8 bits takes 1.1
times as long.

Every tensor that is used is also looked through for NaN and infinity, on a thread beside the one that copies: where a
second core is free it costs no time, as it brings in pages of the tensors used in place that the warm-up would touch.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from engine.checkpoint.kinds import kind_of_tensor
from engine.checkpoint.weights import WeightSource
from engine.link.errors import StartError
from engine.link.progress import Stage, StartProgress
from engine.memory import release_freed_memory
from engine.models.base import CausalLM, CheckpointLayers, Loadable

logger = logging.getLogger(__name__)

MAX_UNCHECKED = 8
"""Tensors on their way to another device that may wait to be looked through: the host keeps them so long."""

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


def load_weights(
    model: CausalLM,
    folder: Path,
    weights: WeightSource,
    device: torch.device,
    num_shards: int = 1,
    progress: StartProgress | None = None,
) -> None:
    """Fill every layer of `model` from the folder's `weights`. Raises StartError naming the tensor that does not fit.

    The layers take about one of `num_shards` parts of the bytes, which only the progress goes by.
    """
    layers = model.checkpoint_layers()
    names = _loading_order([name for name in weights.names if not model.is_ignored(name)], layers)
    num_missing = Counter(id(_layer_of(name, layers)) for name in names)
    is_host = device.type == "cpu"
    progress = progress or StartProgress()
    loaded = _LoadedBytes(progress, sum(_num_bytes(weights, name) for name in names) // num_shards)
    checks: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="finite") as checker:
        for name in names:
            tensor = _load_tensor(weights, name, layers, is_host=is_host)
            loaded.add(tensor.nbytes)
            if tensor.is_floating_point():
                checks.append(checker.submit(_refuse_non_finite, weights.file(name), name, tensor))
            del tensor
            if not is_host and len(checks) > MAX_UNCHECKED:
                checks.popleft().result()
            layer = _layer_of(name, layers)
            num_missing[id(layer)] -= 1
            if not is_host and layer is not None and not num_missing[id(layer)] and not _lacks(layer, layers):
                _finish(layer, layers, device)
    for check in checks:
        check.result()
    _refuse_missing(folder, layers)
    if is_host:
        _finish_all(layers, device, progress)


def _refuse_missing(folder: Path, layers: CheckpointLayers) -> None:
    for prefix, (layer, part) in layers.items():
        if missing := layer.missing(part):
            raise StartError(f"{folder} lacks the tensor {prefix}.{missing[0]}: the checkpoint is not complete")


def _finish_all(layers: CheckpointLayers, device: torch.device, progress: StartProgress) -> None:
    progress.begin(Stage.PACKING)
    distinct = {id(layer): layer for layer, _ in layers.values()}.values()
    for num_done, layer in enumerate(distinct, start=1):
        _finish(layer, layers, device)
        progress.advance(num_done / len(distinct), f"Packing weights: {num_done} of {len(distinct)} layers")


def _num_bytes(weights: WeightSource, name: str) -> int:
    """The size of a tensor as it is read: blocks of a GGUF file are smaller."""
    dtype = TORCH_DTYPES.get(weights.dtype(name), torch.float32)
    return math.prod(weights.shape(name)) * dtype.itemsize


def _loading_order(names: Sequence[str], layers: CheckpointLayers) -> list[str]:
    """Tensors that decide how others are cut, then layer after layer, in the order in which the files have them."""
    places: dict[int, int] = {}
    for name in names:
        places.setdefault(id(_layer_of(name, layers)), len(places))
    return sorted(names, key=lambda name: (not _decides_cut(name, layers), places[id(_layer_of(name, layers))]))


def _layer_of(name: str, layers: CheckpointLayers) -> Loadable | None:
    """The layer that takes the tensor; None: the model does not know it."""
    layer, _ = layers.get(name.rpartition(".")[0], (None, 0))
    return layer


def _decides_cut(name: str, layers: CheckpointLayers) -> bool:
    """Whether the tensor must be read before the others, because their cut depends on it."""
    prefix, _, leaf = name.rpartition(".")
    if prefix not in layers:
        return False
    layer, part = layers[prefix]
    return layer.decides_order(leaf, part)


def _load_tensor(weights: WeightSource, name: str, layers: CheckpointLayers, *, is_host: bool) -> torch.Tensor:
    """Hand a tensor to its layer; returns the part that the layer needs. Raises StartError.

    Unless the layers stay in the host's memory (`is_host`), none goes on to use that of a tensor.
    """
    prefix, _, leaf = name.rpartition(".")
    file_name = weights.file(name).name
    if prefix not in layers:
        raise _unknown(file_name, name)
    layer, part = layers[prefix]
    stored_dtype = weights.dtype(name)
    dtype = TORCH_DTYPES.get(stored_dtype)
    if dtype is None:
        raise StartError(f"tensor {name} is stored as {stored_dtype}: only {', '.join(TORCH_DTYPES)} are loaded")
    try:
        cut = layer.cut(leaf, part, weights.shape(name))
        index = () if cut is None else (*[slice(None)] * cut[0], cut[1])
        tensor = weights.read(name, index, is_kept=is_host and not layer.is_copied(leaf, part, dtype))
        layer.load(leaf, part, tensor)
    except KeyError:
        raise _unknown(file_name, name) from None
    except ValueError as error:
        raise StartError(f"tensor {name} {error}: config.json and the weights do not belong together") from error
    return tensor


def _unknown(file_name: str, name: str) -> StartError:
    kind = kind_of_tensor(name)
    return StartError(
        f"{file_name} has a tensor {name} that the model does not know" + (f": the folder {kind}" if kind else "")
    )


def _lacks(layer: Loadable, layers: CheckpointLayers) -> bool:
    """Whether a tensor of the layer is in none of the files."""
    return any(layer.missing(part) for other, part in layers.values() if other is layer)


def _finish(layer: Loadable, layers: CheckpointLayers, device: torch.device) -> None:
    """Let a layer choose its kernels, all of whose tensors are loaded. Raises StartError."""
    try:
        layer.finish(device)
        release_freed_memory()
    except ValueError as error:
        prefixes = [prefix for prefix, (other, _) in layers.items() if other is layer]
        raise StartError(f"{prefixes[-1]} cannot be run: {error}") from error


def _refuse_non_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.float8_e4m3fn:  # torch sums none of these, and they have no infinity
        tensor = tensor.to(torch.float16)
    # The sum takes one fast pass and is not finite if any value isn't; sums of finite values may overflow, though.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise StartError(f"{path} has a tensor {name} with NaN or infinite values: fetch the model again")


class _LoadedBytes:
    """Reports how many bytes of how many are loaded."""

    def __init__(self, progress: StartProgress, num_bytes: int) -> None:
        self._progress = progress
        self._num_bytes = max(num_bytes, 1)
        self._num_loaded = 0
        progress.begin(Stage.LOADING)

    def add(self, num_bytes: int) -> None:
        self._num_loaded += num_bytes
        done = min(1.0, self._num_loaded / self._num_bytes)
        self._progress.advance(done, f"Loading weights: {100 * done:.0f} % of {self._num_bytes / 1e9:.2f} GB")
