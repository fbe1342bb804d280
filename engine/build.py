"""A folder -> a model with its weights, this rank's part, on its device."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.adapters import AdapterSlots
from engine.checkpoint.adapter import MergedWeights
from engine.checkpoint.files import read_model_config, read_quantization_config
from engine.checkpoint.kinds import refuse_other_kinds
from engine.checkpoint.loader import load_weights
from engine.checkpoint.tied_head import TIED_KEY, with_stored_head
from engine.checkpoint.weight_files import find_weight_files
from engine.checkpoint.weights import open_weights
from engine.device import Device, resolve_dtype
from engine.layers import OPS
from engine.layers.rope import replace_rope_scaling
from engine.limits import check_weights_fit, weights_refusal
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.model_files import ADAPTER_CONFIG
from engine.link.progress import StartProgress
from engine.link.registry import import_entry
from engine.models import MODELS
from engine.models.base import CausalLM, ModelContext
from engine.models.config import MAX_SIZES
from parallel.partition import SplitError
from parallel.state import ParallelState
from quant.base import FormatError
from quant.config import Quantization, resolve_quantization
from quant.dense import DenseMethod

logger = logging.getLogger(__name__)

ALONE = ParallelState()


def choose_quantization(
    config: dict[str, Any],
    folder: Path,
    dtype: torch.dtype,
    device: Device,
    flag: str | None,
    head_flag: str | None,
    *,
    is_bfloat16: bool = False,
) -> Quantization:
    """The method of each matrix of the folder's model, by the flags and the checkpoint. Raises StartError.

    `is_bfloat16`: the user asked for that dtype by name, so that activations may be rounded to it.
    """
    dense = DenseMethod(dtype, computes_in_float32=device.computes_in_float32)
    try:
        stored = read_quantization_config(folder, config)
        names = open_weights(folder).names if stored else ()  # a dense checkpoint's headers are read once, to load it
        is_exact = dtype == torch.float32
        quantization = resolve_quantization(
            flag, head_flag, stored, names, dense, matrices=device.matrices, is_exact=is_exact, is_bfloat16=is_bfloat16
        )
        return quantization.tuned_for(device.architecture)
    except FormatError as error:
        raise StartError(str(error)) from error


def build_model(
    config: dict[str, Any],
    folder: Path,
    dtype: torch.dtype,
    device: Device,
    quantization: Quantization | None = None,
    parallel: ParallelState = ALONE,
    adapter: Path | None = None,
    progress: StartProgress | None = None,
) -> CausalLM:
    """The model of a folder with this rank's part of the weights on the device.

    `quantization` None: as the checkpoint says. `adapter`: the folder of an adapter that is merged. Raises StartError.
    """
    quantization = quantization or choose_quantization(config, folder, dtype, device, None, None)
    weights = open_weights(folder)
    if adapter is not None:
        weights = merged = MergedWeights(weights, folder, adapter, is_tied=bool(config.get(TIED_KEY)))
        logger.info("Merging %s into %d tensors", adapter, len(merged.changed_names))
    config = with_stored_head(config, weights)
    with _naming_defaults(config):
        model = make_model(config, quantization, device.activation_dtype(dtype), device, parallel, len(weights.names))
        load_weights(model, folder, weights, device.torch_device, parallel.size, progress)
    return model


@contextlib.contextmanager
def _naming_defaults(config: Mapping[str, Any]) -> Iterator[None]:
    """Let a refusal name the sizes that config.json leaves to its family."""
    try:
        yield
    except StartError as error:
        if lacking := [key for key in MAX_SIZES if key not in config]:
            raise StartError(f"{error}; config.json does not say {', '.join(lacking)}") from error
        raise


def make_model(
    config: dict[str, Any],
    quantization: Quantization,
    activation_dtype: torch.dtype,
    device: Device,
    parallel: ParallelState = ALONE,
    num_tensors: int | None = None,
) -> CausalLM:
    """The rank's part of the model that config.json describes, without weights.

    `num_tensors`: as `ModelContext` has it.
    Raises StartError for a config.json that isn't supported or can't be cut for so many ranks.
    """
    model_class = import_entry(MODELS, str(config.get("model_type", "")), "model_type")
    context = ModelContext(
        parallel=parallel,
        quantization=quantization,
        ops=import_entry(OPS, device.ops, "ops")(),
        activation_dtype=activation_dtype,
        device=device.torch_device,
        num_tensors=num_tensors,
    )
    try:
        model: CausalLM = model_class(config, context)
    except SplitError as error:
        fitting = [str(size) for size in range(1, parallel.size) if _is_splittable(model_class, config, context, size)]
        fix = f"start with --num-shard {' or '.join(fitting)}" if fitting else "correct config.json"
        raise StartError(f"the model can't be cut for {parallel.size} shards: {error}: {fix}") from error
    except FormatError as error:
        raise StartError(str(error)) from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # no check foresaw it
        raise StartError(f"config.json can't be used ({error!r}): fetch the model again") from error
    return model


def _is_splittable(model_class: type[CausalLM], config: dict[str, Any], context: ModelContext, num_shards: int) -> bool:
    try:
        for rank in range(num_shards):
            model_class(config, dataclasses.replace(context, parallel=ParallelState(rank, num_shards)))
    except SplitError:
        return False
    return True


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A folder's model with its weights, and what was resolved on the way."""

    model: CausalLM
    config: dict[str, Any]
    """config.json, with the rope scaling that the flags ask for."""
    dtype: torch.dtype
    quantization: Quantization
    weight_bytes: int
    """Memory of this rank's weights: measured on a device with its own memory, elsewhere a rough estimate."""
    free_bytes: int
    """Memory that could be used before the weights were there."""
    adapters: AdapterSlots | None = None
    """Adapters beside the model; None: requests can't name any."""


@dataclasses.dataclass(frozen=True, slots=True)
class Siblings:
    """The ranks that start at the same time, as far as loading is concerned."""

    parallel: ParallelState = ALONE
    local_size: int = 1
    """Ranks on this host, this one included."""
    wait_for_all: Callable[[], object] = lambda: None
    """Returns once every rank has called it."""


NO_SIBLINGS = Siblings()


def load_model(
    config: EngineConfig, device: Device, siblings: Siblings = NO_SIBLINGS, progress: StartProgress | None = None
) -> LoadedModel:
    """The rank's part of the model as `config` describes it. Raises StartError in words."""
    parallel, folder = siblings.parallel, Path(config.model_path)
    model_config = replace_rope_scaling(read_model_config(folder), config.rope_scaling, config.rope_factor)
    refuse_other_kinds(folder, model_config)
    adapter = _merged_adapter(config, folder, model_config)
    if parallel.rank == 0:
        _log_unused(folder, model_config)
    dtype = resolve_dtype(config.dtype, model_config.get("dtype") or model_config.get("torch_dtype"), device)
    # Counted before loading: mapped weights are page cache, which the kernel calls available although we need it.
    # On a CPU all ranks of the host share it, and none has taken anything before all have counted.
    num_sharing = siblings.local_size if device.is_memory_shared else 1
    free_bytes = device.usable_bytes(config.memory_fraction) // num_sharing
    siblings.wait_for_all()
    flags = config.quantize, config.quantize_head
    is_bfloat16 = config.dtype == "bfloat16"
    quantization = choose_quantization(model_config, folder, dtype, device, *flags, is_bfloat16=is_bfloat16)
    file_bytes = sum(path.stat().st_size for path in find_weight_files(folder).paths)
    weight_bytes = int(file_bytes * quantization.size_factor) // parallel.size
    check_weights_fit(weight_bytes, free_bytes, config.memory_fraction)
    started = time.monotonic()
    device_bytes = device.free_memory_bytes()
    try:
        # A merged adapter is a sum of products: its bits shall not depend on the number of threads.
        with _packing_threads(config.num_threads if adapter is None or device.memory is not None else 1):
            model = build_model(model_config, folder, dtype, device, quantization, parallel, adapter, progress)
            room = free_bytes - weight_bytes if device.memory is None else device.free_memory_bytes()
            adapters = make_adapter_slots(config, model, dtype, device, room) if config.has_adapters else None
    except torch.OutOfMemoryError as error:
        raise StartError(weights_refusal(None, free_bytes, config.memory_fraction)) from error
    if device.memory is not None:
        device.memory.release_cached()
        weight_bytes = device_bytes - device.free_memory_bytes()
    elif adapters is not None:
        weight_bytes += adapters.num_bytes
        check_weights_fit(weight_bytes, free_bytes, config.memory_fraction)
    logger.info("Weights loaded in %.1f s", time.monotonic() - started)
    return LoadedModel(model, model_config, dtype, quantization, weight_bytes, free_bytes, adapters)


def _merged_adapter(config: EngineConfig, folder: Path, model_config: dict[str, Any]) -> Path | None:
    """The folder of the adapter that is merged into the model. Raises StartError for a model that is quantised."""
    if config.adapter_path is None:
        return None
    adapter = Path(config.adapter_path)
    if read_quantization_config(folder, model_config):
        raise StartError(
            f"{folder} is quantised, and no adapter can be merged into it: name the dense model as "
            f"base_model_name_or_path in {adapter / ADAPTER_CONFIG}, and give --quantize"
        )
    return adapter


def make_adapter_slots(
    config: EngineConfig, model: CausalLM, dtype: torch.dtype, device: Device, free_bytes: int | None = None
) -> AdapterSlots:
    """Memory for the adapters of `config` beside the model; the first of them are in it. Raises StartError.

    `free_bytes` are there for it; None: that is not known.
    """
    adapters = AdapterSlots(
        model,
        Path(config.model_path),
        config.lora_adapters,
        backend=device.matrices,
        num_slots=config.max_loras,
        max_rank=config.max_lora_rank,
        dtype=dtype,
        activation_dtype=device.activation_dtype(dtype),
        device=device.torch_device,
        free_bytes=free_bytes,
    )
    logger.info(
        "Adapters: %d known, %d in memory at a time (%.0f MB), of rank %d at most",
        len(config.lora_adapters),
        adapters.num_slots,
        adapters.num_bytes / 1e6,
        adapters.max_rank,
    )
    return adapters


def _log_unused(folder: Path, model_config: dict[str, Any]) -> None:
    """Log what a folder has and the engine makes no use of."""
    if others := find_weight_files(folder).others:
        logger.warning("Files beside the model that are not loaded: %s", ", ".join(others))
    dual_chunk = model_config.get("dual_chunk_attention_config")
    if isinstance(dual_chunk, dict):
        logger.warning(
            "dual_chunk_attention_config in config.json has no effect, as in transformers: answers to more than %s "
            "tokens may be worse than with such attention",
            dual_chunk.get("original_max_position_embeddings", "the usual number of"),
        )


@contextlib.contextmanager
def _packing_threads(num_threads: int) -> Iterator[None]:
    """Let torch copy and pack matrices on `num_threads` of the host's threads.

    Afterwards they are Numba's (`engine.start.set_threads`), whose pool does nothing yet.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
