"""The method of each matrix, by --quantize and by what the checkpoint says about itself.

The checkpoint's settings are `quantization_config` (or `compression_config`) in config.json, else those in
quantize_config.json or quant_config.json. There are two tables: formats that are read, and methods that quantize while
they load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from quant.base import (
    CheckpointFormat,
    FormatError,
    GroupedKernel,
    LinearMethod,
    MatrixKernel,
    OnLoadMethod,
    PackedWeight,
)
from quant.dense import DenseMethod
from quant.grouped import choose_grouped
from quant.kernels import MATRICES, choose_kernel, rounding_instructions
from quant.kernels.tuning import TUNED_TILES, read_tuned_tiles
from quant.registry import load_entry

FORMATS: dict[str, str] = {
    "gptq": "quant.gptq:GptqFormat",
    "awq": "quant.awq:AwqFormat",
    "auto-round": "quant.auto_round:AutoRoundFormat",
    "compressed-tensors": "quant.compressed_tensors:CompressedTensorsFormat",
    "fp8": "quant.fp8:Fp8Format",
    "gguf": "quant.gguf:GgufFormat",
}
"""`quant_method` of a checkpoint -> lazy "module:Class" of a `quant.base.CheckpointFormat`."""

ON_LOAD: dict[str, str] = {
    "eetq": "quant.on_load:Int8Method",
    "int8": "quant.on_load:Int8Method",
    "int4": "quant.on_load:Int4Method",
}
"""--quantize values for dense checkpoints, which --quantize-head takes too -> lazy class of an `OnLoadMethod`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """A method for every matrix of one model."""

    description: str
    """For the start-up summary."""
    dense: LinearMethod
    """The method of tables in which rows are looked up."""
    linear: LinearMethod
    """The method of every matrix that the checkpoint stores dense, heads aside."""
    head: LinearMethod
    """The method of an output head that the checkpoint stores dense."""
    quantized_method: Callable[[str], LinearMethod | None]
    """The name of a matrix -> its method; None: the checkpoint stores it dense."""
    matrices: str
    """The backend of the matrix kernels, a key of `quant.kernels.MATRICES`."""
    rounded_layouts: Collection[str] = ()
    """The layouts of `PackedWeight` before which activations are rounded where there are kernels that do."""
    size_factor: float = 1.0
    """Memory of the weights over the size of the files, roughly."""
    architecture: str | None = None
    """The device's, as `engine.device.Device` gives it."""

    def tuned_for(self, architecture: str | None) -> Quantization:
        """The same on a device of that architecture. Raises FormatError if what was measured can't be read."""
        read_tuned_tiles(TUNED_TILES)
        return dataclasses.replace(self, architecture=architecture)

    def kernel_for(self, packed: PackedWeight) -> MatrixKernel:
        """Choose the kernel for one of the model's matrices; implements `quant.base.KernelChooser`."""
        packed = dataclasses.replace(packed, architecture=self.architecture)
        return choose_kernel(self.matrices, packed, is_exact=packed.layout not in self.rounded_layouts)

    def grouped_kernel_for(self, matrices: Sequence[PackedWeight]) -> GroupedKernel:
        """Choose the kernel for matrices of one shape, of which each row has one."""
        is_exact = matrices[0].layout not in self.rounded_layouts
        return choose_grouped(self.matrices, matrices, self.kernel_for, is_exact=is_exact)

    def head_kernel_for(self, packed: PackedWeight) -> MatrixKernel:
        """As `kernel_for`, for the output head: logits come in float32 from kernels that have them so."""
        return self.kernel_for(dataclasses.replace(packed, out_dtype=torch.float32))

    @property
    def roundings(self) -> dict[str, str]:
        """Layout -> the instructions with which its kernels round activations; only layouts where they do."""
        found = {layout: rounding_instructions(self.matrices, layout) for layout in self.rounded_layouts}
        return {layout: instructions for layout, instructions in found.items() if instructions is not None}

    def method_for(self, module: str) -> LinearMethod:
        """The method of a matrix, by the checkpoint's name for it, `model.layers.0.mlp.up_proj`."""
        return self.quantized_method(module) or self.linear

    def head_method_for(self, module: str) -> LinearMethod:
        """The method of a matrix that is the model's output head."""
        return self.quantized_method(module) or self.head


def resolve_quantization(
    flag: str | None,
    head_flag: str | None,
    settings: Mapping[str, Any] | None,
    tensor_names: Collection[str],
    dense: DenseMethod,
    *,
    matrices: str,
    is_exact: bool,
    is_bfloat16: bool = False,
) -> Quantization:
    """Choose the methods of a model by the flags and by `settings`, the checkpoint's own configuration (None: dense).

    `is_exact` (--dtype float32) leaves the head dense and activations unrounded; with `is_bfloat16` (--dtype bfloat16)
    those of dense matrices are rounded. Raises FormatError, in a sentence.
    """
    stored_name = _stored_name(settings or {})
    _check_flag(flag, stored_name)
    dense_matrix = dense.reordered() if is_bfloat16 and rounding_instructions(matrices, "dense") else dense
    linear: LinearMethod = dense_matrix
    description, size_factor = "not quantised", 1.0
    quantized_method: Callable[[str], LinearMethod | None] = _no_method
    if stored_name is not None:
        stored_format: CheckpointFormat = load_entry(FORMATS[stored_name])(settings)
        description, size_factor = stored_format.description, stored_format.size_factor(is_exact=is_exact)
        quantized_method = _where_marked(stored_format, tensor_names)
    elif flag is not None:
        method = _on_load_method(flag)
        description, linear, size_factor = flag, method, method.SIZE_FACTOR
    is_dense = stored_name is None and flag is None
    head_flag = head_flag or ("none" if is_dense or is_exact else "int8")
    head = dense_matrix if head_flag == "none" else _on_load_method(head_flag)
    description += f", head {'dense' if head_flag == 'none' else head_flag}"
    rounded = _rounded_layouts(is_exact or (is_dense and head is dense_matrix), is_bfloat16)
    return Quantization(description, dense, linear, head, quantized_method, matrices, rounded, size_factor)


def _rounded_layouts(is_exact: bool, is_bfloat16: bool) -> list[str]:
    """The layouts before which activations are rounded; the reference implementation has all layouts."""
    return [layout for layout in MATRICES["torch"] if (is_bfloat16 if layout == "dense" else not is_exact)]


def _check_flag(flag: str | None, stored_name: str | None) -> None:
    """Raise FormatError where --quantize contradicts the checkpoint, or asks for what a dense one can't give."""
    if flag is None or flag == stored_name:
        return
    if stored_name is not None:
        raise FormatError(f"--quantize {flag}, but the checkpoint is {stored_name}: leave --quantize out")
    if flag not in ON_LOAD:
        raise FormatError(
            f"--quantize {flag} needs a checkpoint in that format, this one is dense: give the path of one as "
            f"--model-id, or --quantize one of {', '.join(ON_LOAD)}"
        )


def _stored_name(settings: Mapping[str, Any]) -> str | None:
    """The key of the checkpoint's format, None: it is dense. Raises FormatError for a format that can't be read."""
    if not settings:
        return None
    name = settings.get("quant_method") or settings.get("method") or _recognize(settings)
    if not isinstance(name, str) or name not in FORMATS:
        raise FormatError(
            f"the checkpoint is quantised with {name!r}, which can't be loaded; {', '.join(FORMATS)} can, and dense "
            f"checkpoints with --quantize {', '.join(ON_LOAD)}"
        )
    return name


def _recognize(settings: Mapping[str, Any]) -> str | None:
    """The format of settings that do not name theirs."""
    return next((name for name, entry in FORMATS.items() if load_entry(entry).is_recognized(settings)), None)


def _on_load_method(name: str) -> OnLoadMethod:
    method: OnLoadMethod = load_entry(ON_LOAD[name])()
    return method


def _no_method(module: str) -> LinearMethod | None:
    return None


def _where_marked(
    stored_format: CheckpointFormat, tensor_names: Collection[str]
) -> Callable[[str], LinearMethod | None]:
    """The format's methods for the modules that have its marker among their tensors.

    The lists of modules that the tools write are not asked: autoawq matches its own against shorter names than
    transformers does.
    """
    marker = stored_format.MARKER
    markers = (marker,) if isinstance(marker, str) else marker
    split_names = (name.rpartition(".") for name in tensor_names)
    quantized = {module for module, _, leaf in split_names if leaf in markers}
    return lambda module: stored_format.method_for(module) if module in quantized else None
