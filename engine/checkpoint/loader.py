"""Weights -> the layers of a model. Tensors that a layer can use in place are not copied, and only the part of a tensor
that a layer needs is read.

Every tensor that is used is also looked through for NaN and infinity, on a thread beside the one that copies: where a
second core is free it costs no time, as it brings in pages of the tensors used in place that the warm-up would touch.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from engine.checkpoint.weights import WeightSource, open_weights
from engine.link.errors import StartError
from engine.memory import release_freed_memory
from engine.models.base import CausalLM, CheckpointLayers

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 1.0

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def load_weights(model: CausalLM, folder: Path, device: torch.device, num_shards: int = 1) -> None:
    """Fill every layer of `model` from the folder's files. Raises StartError naming the tensor that does not fit.

    The layers take about one of `num_shards` parts of the bytes, which only the progress goes by.
    """
    layers, weights = model.checkpoint_layers(), open_weights(folder)
    names = [name for name in weights.names if not model.is_ignored(name)]
    progress = _Progress(sum(path.stat().st_size for path in weights.files) // num_shards)
    checks: list[Future[None]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="finite") as checker:
        for name in sorted(names, key=lambda name: not _decides_cut(name, layers)):
            tensor = _load_tensor(weights, name, layers)
            if tensor.is_floating_point():
                checks.append(checker.submit(_refuse_non_finite, weights.file(name), name, tensor))
            progress.add_bytes(tensor.nbytes)
    for check in checks:
        check.result()
    for prefix, (layer, part) in layers.items():
        if missing := layer.missing(part):
            raise StartError(f"{folder} lacks the tensor {prefix}.{missing[0]}: the checkpoint is not complete")
    _finish(layers, device)


def _decides_cut(name: str, layers: CheckpointLayers) -> bool:
    """Whether the tensor must be read before the others, because their cut depends on it."""
    prefix, _, leaf = name.rpartition(".")
    if prefix not in layers:
        return False
    layer, part = layers[prefix]
    return layer.decides_order(leaf, part)


def _load_tensor(weights: WeightSource, name: str, layers: CheckpointLayers) -> torch.Tensor:
    """Hand a tensor to its layer; returns the part that the layer needs. Raises StartError."""
    prefix, _, leaf = name.rpartition(".")
    file_name = weights.file(name).name
    if prefix not in layers:
        raise StartError(f"{file_name} has a tensor {name} that the model does not know")
    layer, part = layers[prefix]
    stored_dtype = weights.dtype(name)
    dtype = TORCH_DTYPES.get(stored_dtype)
    if dtype is None:
        raise StartError(f"tensor {name} is stored as {stored_dtype}: only {', '.join(TORCH_DTYPES)} are loaded")
    try:
        cut = layer.cut(leaf, part, weights.shape(name))
        index = () if cut is None else (*[slice(None)] * cut[0], cut[1])
        tensor = weights.read(name, index, is_kept=not layer.is_copied(leaf, part, dtype))
        layer.load(leaf, part, tensor)
    except KeyError:
        raise StartError(f"{file_name} has a tensor {name} that the model does not know") from None
    except ValueError as error:
        raise StartError(f"tensor {name} {error}: config.json and the weights do not belong together") from error
    return tensor


def _finish(layers: CheckpointLayers, device: torch.device) -> None:
    """Let each layer choose its kernels, once for all of its parts. Raises StartError."""
    for prefix, layer in {id(layer): (prefix, layer) for prefix, (layer, _) in layers.items()}.values():
        try:
            layer.finish(device)
            release_freed_memory()
        except ValueError as error:
            raise StartError(f"{prefix} cannot be run: {error}") from error


def _refuse_non_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    # The sum takes one fast pass and is not finite if any value isn't; sums of finite values may overflow, though.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise StartError(f"{path} has a tensor {name} with NaN or infinite values: fetch the model again")


class _Progress:
    """Logs how many bytes are loaded, at most once a second."""

    def __init__(self, total_bytes: int) -> None:
        self._total = max(total_bytes, 1)
        self._done = 0
        self._next_time = time.monotonic() + PROGRESS_INTERVAL_S

    def add_bytes(self, num_bytes: int) -> None:
        self._done += num_bytes
        if time.monotonic() >= self._next_time:
            self._next_time = time.monotonic() + PROGRESS_INTERVAL_S
            percent = 100 * self._done / self._total
            logger.info("Loading weights: %.0f %% of %.2f GB", percent, self._total / 1e9)
