"""`text-generation-server quantize` writes a dense model, layer by layer, to a folder of quantized weights."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from engine.build import make_model
from engine.checkpoint.files import read_model_config, read_quantization_config
from engine.checkpoint.hub import check_may_upload, download_model, upload_model
from engine.checkpoint.kinds import refuse_other_kinds
from engine.checkpoint.loader import load_weights
from engine.checkpoint.tied_head import with_stored_head
from engine.checkpoint.weights import WeightSource, open_weights
from engine.device import Device, detect_device
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.model_files import adapter_base
from engine.link.progress import Bar
from engine.link.registry import import_entry
from engine.memory import host_free_bytes
from engine.models.base import CausalLM
from engine.quantize.calibration_text import CalibrationText, read_calibration_text
from engine.quantize.checkpoint import CheckpointWriter
from engine.quantize.methods import METHODS
from engine.quantize.options import QuantizeOptions
from engine.quantize.perplexity import perplexity
from engine.quantize.quantizer import Quantizer, make_quantizer
from engine.quantize.stages import STAGES, LayerStages, LayerTensors
from quant.base import FormatError
from quant.config import resolve_quantization
from quant.dense import DenseMethod
from quant.packing import WORD_BITS

logger = logging.getLogger(__name__)

OFFERED_GROUP_SIZES = (128, 64, 32, 16, -1)
"""Values of --groupsize that a refusal suggests, if they divide."""
AWQ_OUTPUTS = 8
"""Outputs in a word of AWQ's; all formats are held to it."""


def quantize(options: QuantizeOptions) -> Path:
    """Write the quantized model; returns its folder. Raises StartError, in a sentence."""
    if options.upload_to is not None:
        check_may_upload(options.upload_to)
    source, output = download_model(options.model_id, options.revision), Path(options.output_dir)
    try:
        with CheckpointWriter(output) as writer:
            text, before = _quantize(options, source, writer)
    except (OSError, SafetensorError) as error:
        raise StartError(f"{output} cannot be written ({error}): free space, or give another OUTPUT_DIR") from error
    except torch.OutOfMemoryError as error:
        raise StartError(
            "the device's memory is too small for a layer of this model: give smaller --sample-tokens, or hide the "
            "device with CUDA_VISIBLE_DEVICES="
        ) from error
    # From here on the folder is whole, and stays whatever happens.
    after = _perplexity(output, text, options)
    if before is not None and after is not None:
        logger.info(
            "Perplexity on the last %d tokens of %s: %.3f before, %.3f after (%+.1f %%)",
            len(text.held_out),
            options.dataset,
            before,
            after,
            100 * (after / before - 1),
        )
    if options.upload_to is not None:
        upload_model(output, options.upload_to)
    return output


def _quantize(options: QuantizeOptions, source: Path, writer: CheckpointWriter) -> tuple[CalibrationText, float | None]:
    """Check everything, then write the folder; returns the text, and the perplexity of the dense model."""
    if adapter_base(source) is not None:
        raise StartError(f"{source} is an adapter: merge it with `peft` first, or serve it with --quantize int4")
    config = read_model_config(source)
    refuse_other_kinds(source, config)
    if read_quantization_config(source, config):
        raise StartError(f"{source} is quantised already: give the model that it was made from")
    reader, device = open_weights(source), detect_device()
    config = with_stored_head(config, reader)
    stages_class: type[LayerStages] = import_entry(STAGES, str(config.get("model_type", "")), "model_type")
    model = _checked_model(config, source, reader, device)
    num_tokens, num_positions = options.sample_tokens, model.max_position_embeddings
    if num_tokens > num_positions:
        raise StartError(
            f"--sample-tokens {num_tokens} is more than the {num_positions} positions of the model: give fewer"
        )
    _check_matrices(options, reader, stages_class)
    text = _read_text(options, source)
    if text.samples:
        _check_memory(options, reader, stages_class)

    before = _perplexity(source, text, options)
    start = time.monotonic()
    stages = stages_class(config, model.attention_shape, model.rotary, num_tokens, device.torch_device)
    quantizer = make_quantizer(options, stages)
    _write_tensors(quantizer, reader, model, stages, text, writer, device)
    output = quantizer.output
    settings = output.quantization_config(options)
    files = {} if output.SETTINGS_FILE is None else {output.SETTINGS_FILE: settings}
    writer.finish(source, files | {"config.json": _with_quantization(config, settings)})
    logger.info("Quantised in %s", datetime.timedelta(seconds=round(time.monotonic() - start)))
    return text, before


def _write_tensors(
    quantizer: Quantizer,
    reader: WeightSource,
    model: CausalLM,
    stages: LayerStages,
    text: CalibrationText,
    writer: CheckpointWriter,
    device: Device,
) -> None:
    """Write every tensor of the quantized model."""
    names = [name for name in reader.names if not model.is_ignored(name)]
    for name in names:
        if not name.startswith(f"{stages.LAYERS}."):
            writer.add(name, _half(name, reader.read(name)))
    hidden = _embed(stages.EMBEDDING, reader, text.samples)
    progress = _Progress(model.num_layers * len(stages.MATRICES))
    for index in range(model.num_layers):
        prefix = f"{stages.LAYERS}.{index}."
        layer = {name.removeprefix(prefix): _wide(name, reader, device) for name in names if name.startswith(prefix)}
        _quantize_layer(index, layer, hidden, stages, quantizer, progress)
        for name, tensor in _stored_layer(layer, quantizer).items():
            writer.add(f"{prefix}{name}", tensor)


def _checked_model(config: dict[str, Any], source: Path, reader: WeightSource, device: Device) -> CausalLM:
    """The engine's model, all its weights looked through: whole, of the right shapes, finite. Raises StartError."""
    dense = DenseMethod(torch.float32, computes_in_float32=True)  # maps the files and copies nothing
    quantization = resolve_quantization(None, None, None, (), dense, matrices=device.matrices, is_exact=True)
    model = make_model(config, quantization, torch.float32, device)
    load_weights(model, source, reader, torch.device("cpu"))
    return model


def _check_matrices(options: QuantizeOptions, reader: WeightSource, stages: type[LayerStages]) -> None:
    """Raise StartError if a matrix can't have these groups or can't be packed."""
    bits, group_size = options.bits, options.group_size
    modules = [module for matrices in stages.MATRICES for module in matrices]
    shapes = {module: reader.shape(f"{stages.LAYERS}.0.{module}.weight") for module in modules}
    for module, (num_outputs, num_inputs) in shapes.items():
        if group_size != -1 and num_inputs % group_size:
            fitting = [
                size
                for size in OFFERED_GROUP_SIZES
                if size == -1 or all(shape[1] % size == 0 for shape in shapes.values())
            ]
            raise StartError(
                f"--groupsize {group_size} does not divide the {num_inputs} inputs of {module}: give "
                f"{' or '.join(map(str, fitting))} (-1 is one group for all)"
            )
        is_packing = num_inputs * bits % WORD_BITS == 0 and num_outputs * bits % WORD_BITS == 0
        if not is_packing or num_outputs % AWQ_OUTPUTS:
            raise StartError(
                f"{module} has {num_outputs} outputs and {num_inputs} inputs, which don't fill words of {WORD_BITS} "
                f"bits with weights of {bits}: give other --bits, or serve the model with --quantize int4 as it is"
            )


def _check_memory(options: QuantizeOptions, reader: WeightSource, stages: type[LayerStages]) -> None:
    """Raise StartError if calibration would not fit."""
    shapes = [reader.shape(name) for name in reader.names if name.startswith(f"{stages.LAYERS}.0.")]
    widest = max(shape[-1] for shape in shapes)
    layer = sum(shape[0] * shape[-1] for shape in shapes if len(shape) == 2)
    rows = options.num_samples * options.sample_tokens
    needed = 4 * (rows * (2 * reader.shape(stages.EMBEDDING)[1] + widest) + 4 * widest**2 + 3 * layer)
    free = host_free_bytes()
    if needed > free:
        raise StartError(
            f"quantising needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: give fewer "
            "--num-samples or --sample-tokens, or free memory"
        )


def _read_text(options: QuantizeOptions, source: Path) -> CalibrationText:
    if options.dataset is None:
        return CalibrationText([], [])
    return read_calibration_text(
        Path(options.dataset),
        source / "tokenizer.json",
        num_samples=options.num_samples if METHODS[options.method].needs_data else 0,
        sample_tokens=options.sample_tokens,
        num_held_out=options.perplexity_tokens,
    )


def _perplexity(folder: Path, text: CalibrationText, options: QuantizeOptions) -> float | None:
    """The perplexity of the weights with the engine's kernels; None: no tokens are kept apart, or no memory is left.

    Activations are not rounded if the device allows that, and the head stays dense.
    """
    if not text.held_out:
        return None
    logger.info("Scoring %d tokens with %s", len(text.held_out), folder)
    num_threads = torch.get_num_threads()
    try:
        dtype = "float32" if detect_device().computes_in_float32 else "auto"
        engine_config = EngineConfig(model_path=str(folder), dtype=dtype, quantize_head="none", num_threads=num_threads)
        return perplexity(engine_config, text.held_out, options.sample_tokens)
    except StartError as error:
        logger.warning("No perplexity: %s", error)
        return None
    finally:
        torch.set_num_threads(num_threads)  # the engine wants one for torch, calibration all of them
        gc.collect()  # a model refers to itself, and the next one needs its memory


@torch.inference_mode()
def _embed(embedding: str, reader: WeightSource, samples: list[list[int]]) -> torch.Tensor:
    """Embed the samples, [samples, tokens, hidden_size] float32 on the CPU; empty without samples."""
    table = reader.read(embedding)
    ids = torch.tensor(samples, dtype=torch.int64)
    if ids.numel() and int(ids.max()) >= len(table):
        raise StartError("tokenizer.json has more tokens than config.json's vocab_size: fetch the model again")
    return table[ids].to(torch.float32)


@torch.inference_mode()
def _quantize_layer(
    index: int,
    layer: LayerTensors,
    hidden: torch.Tensor,
    stages: LayerStages,
    quantizer: Quantizer,
    progress: _Progress,
) -> None:
    """Run a layer on `hidden`, in place, and let the quantizer see the inputs of its matrices."""

    def on_inputs(modules: tuple[str, ...], inputs: Iterator[torch.Tensor]) -> None:
        progress.step(f"layer {index}, {modules[0]}")
        try:
            quantizer.on_inputs(layer, modules, inputs)
        except FormatError as error:
            raise StartError(f"{stages.LAYERS}.{index}.{modules[0]} {error}") from error

    if hidden.numel():
        stages.run(index, layer, hidden, on_inputs)
    else:
        progress.step(f"layer {index}", len(stages.MATRICES))


@torch.inference_mode()
def _stored_layer(layer: LayerTensors, quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """The layer's tensors as they are stored: matrices packed, all others in float16."""
    stored: dict[str, torch.Tensor] = {}
    rounded = quantizer.finish(layer)
    for module, matrix in rounded.items():
        tensors = quantizer.output.stored_tensors(matrix.cpu())
        stored |= {f"{module}.{name}": tensor for name, tensor in tensors.items()}
    packed = {f"{module}.weight" for module in rounded}
    return stored | {name: _half(name, tensor) for name, tensor in layer.items() if name not in packed}


def _wide(name: str, reader: WeightSource, device: Device) -> torch.Tensor:
    """Read a tensor in float32, to the device. Raises StartError if it does not fit in float16."""
    tensor = reader.read(name)
    _half(name, tensor)  # the scales of larger weights would not fit either
    return tensor.to(device.torch_device, torch.float32)


def _half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float16. Raises StartError if it does not fit."""
    half = tensor.to(torch.float16)
    if not half.isfinite().all():
        raise StartError(f"tensor {name} does not fit in float16, which both formats want: choose another model")
    return half


def _with_quantization(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """config.json of the quantized model."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: "float16", "quantization_config": settings}


@dataclasses.dataclass(slots=True)
class _Progress:
    """Logs how far the model is done."""

    total: int
    num_done: int = 0
    start: float = dataclasses.field(default_factory=time.monotonic)

    def step(self, what: str, count: int = 1) -> None:
        """Log that `what` begins now, and count it as `count` of `total`."""
        if self.num_done:
            done = self.num_done / self.total
            eta = datetime.timedelta(seconds=int((time.monotonic() - self.start) * (1 / done - 1)))
            bar = {"bar": Bar(done, self.start)}
            logger.info("Quantising: %.0f %%, %s, ETA: %s", 100 * done, what, eta, extra=bar)
        self.num_done += count
