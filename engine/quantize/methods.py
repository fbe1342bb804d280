"""The methods of `text-generation-server quantize`: what each makes of a layer, and how its checkpoints describe it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from engine.quantize.options import QuantizeOptions
from engine.quantize.stages import LayerStages, LayerTensors
from quant import awq, gptq
from quant.awq_search import round_clipped, search_scales
from quant.base import FormatError
from quant.gptq_solver import solve
from quant.rounding import RoundedMatrix, round_to_nearest
from quant.statistics import InputStatistics

QUANTIZER = "pytgi:0.1"
"""Who wrote a checkpoint, in the form gptqmodel gives it."""


class Quantizer(Protocol):
    """One model's; `on_inputs` and `finish` in turn for each layer."""

    is_gptq: bool
    """The format: GPTQ's, else AWQ's."""

    def on_inputs(self, layer: LayerTensors, modules: tuple[str, ...], inputs: Iterator[torch.Tensor]) -> None:
        """Look at the inputs [rows, k] of `modules`; may change the layer. Raises FormatError."""

    def finish(self, layer: LayerTensors) -> dict[str, RoundedMatrix]:
        """Each matrix rounded; may change the other tensors of the layer."""


class GptqQuantizer:
    """Rounds each matrix as soon as its inputs are known: the next one sees what it became (true sequential)."""

    is_gptq = True

    def __init__(self, options: QuantizeOptions) -> None:
        self._options = options
        self._rounded: dict[str, RoundedMatrix] = {}

    def on_inputs(self, layer: LayerTensors, modules: tuple[str, ...], inputs: Iterator[torch.Tensor]) -> None:
        options = self._options
        weights = [layer[f"{module}.weight"] for module in modules]
        statistics = gather(inputs, weights[0])
        # Rows are independent of each other: matrices with the same inputs are solved as one.
        rounded = solve(
            torch.cat(weights),
            statistics.gram,
            bits=options.bits,
            group_size=options.group_size,
            percdamp=options.percdamp,
            is_act_order=options.is_act_order,
        )
        first = 0
        for module, weight in zip(modules, weights, strict=True):
            part = rounded.rows(slice(first, first + len(weight)))
            first += len(weight)
            layer[f"{module}.weight"] = part.widen()
            self._rounded[module] = part

    def finish(self, layer: LayerTensors) -> dict[str, RoundedMatrix]:
        rounded, self._rounded = self._rounded, {}
        return rounded


class AwqQuantizer:
    """Sees a whole layer in full precision, then scales, clips and rounds it; as AutoAWQ, the next layer does too."""

    is_gptq = False

    def __init__(self, options: QuantizeOptions, stages: LayerStages) -> None:
        self._group_size = options.group_size
        self._stages = stages
        self._statistics: dict[tuple[str, ...], InputStatistics] = {}

    def on_inputs(self, layer: LayerTensors, modules: tuple[str, ...], inputs: Iterator[torch.Tensor]) -> None:
        statistics = gather(inputs, layer[f"{modules[0]}.weight"])
        if not statistics.mean_abs.isfinite().all():
            raise FormatError("has inputs that are not finite on this dataset: the model itself computes NaN")
        self._statistics[modules] = statistics

    def finish(self, layer: LayerTensors) -> dict[str, RoundedMatrix]:
        # Backwards: folding scales into a matrix changes its outputs before its own inputs are scaled.
        scales = {modules: self._scale(layer, modules) for modules in reversed(self._stages.MATRICES)}
        rounded = {
            module: round_clipped(
                layer[f"{module}.weight"],
                self._statistics[modules].gram,
                scales[modules],
                group_size=self._group_size,
                is_clipping=module not in self._stages.UNCLIPPED,
            )
            for modules in self._stages.MATRICES
            for module in modules
        }
        self._statistics = {}
        return rounded

    def _scale(self, layer: LayerTensors, modules: tuple[str, ...]) -> torch.Tensor:
        """Scale the inputs of `modules` in the layer's tensors; returns the scales [k]."""
        weights = [layer[f"{module}.weight"] for module in modules]
        maker = self._stages.MAKERS[modules]
        made = layer[f"{maker}.weight"]
        if made.shape[0] != weights[0].shape[1]:  # grouped queries: an output of v_proj is several inputs of o_proj
            return torch.ones(weights[0].shape[1], device=made.device)
        scales = search_scales(weights, self._statistics[modules], self._group_size)
        for module, weight in zip(modules, weights, strict=True):
            layer[f"{module}.weight"] = weight * scales
        for name in (f"{maker}.weight", f"{maker}.bias"):
            if name in layer:
                tensor = layer[name]
                layer[name] = tensor / (scales if tensor.dim() == 1 else scales[:, None])
        return scales


class NearestQuantizer:
    """Each weight to its nearest number; no data."""

    def __init__(self, options: QuantizeOptions, stages: LayerStages) -> None:
        self.is_gptq = options.method == "int8"
        self._options = options
        self._stages = stages

    def on_inputs(self, layer: LayerTensors, modules: tuple[str, ...], inputs: Iterator[torch.Tensor]) -> None:
        raise AssertionError("nothing to settle without data")

    def finish(self, layer: LayerTensors) -> dict[str, RoundedMatrix]:
        bits, group_size = self._options.bits, self._options.group_size
        return {
            module: round_to_nearest(
                layer[f"{module}.weight"], bits=bits, group_size=group_size, is_symmetric=self.is_gptq
            )
            for modules in self._stages.MATRICES
            for module in modules
        }


def make_quantizer(options: QuantizeOptions, stages: LayerStages) -> Quantizer:
    if options.method == "gptq":
        return GptqQuantizer(options)
    return AwqQuantizer(options, stages) if options.method == "awq" else NearestQuantizer(options, stages)


def gather(inputs: Iterator[torch.Tensor], weight: torch.Tensor) -> InputStatistics:
    """The statistics of the inputs [rows, k] of a matrix [n, k]."""
    statistics = InputStatistics(weight.shape[1], weight.device)
    for x in inputs:
        statistics.add(x)
    return statistics


def stored_tensors(matrix: RoundedMatrix, *, is_gptq: bool) -> dict[str, torch.Tensor]:
    return gptq.stored_tensors(matrix) if is_gptq else awq.stored_tensors(matrix)


def quantization_config(options: QuantizeOptions, *, is_gptq: bool) -> dict[str, Any]:
    """What config.json says: AutoGPTQ's keys and those gptqmodel added, or AutoAWQ's."""
    if not is_gptq:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": options.bits,
            "group_size": options.group_size,
            "zero_point": True,
            "modules_to_not_convert": None,
        }
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": True,
        "desc_act": options.is_act_order,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": options.percdamp,
        "lm_head": False,
        "meta": {"quantizer": [QUANTIZER]},
    }
