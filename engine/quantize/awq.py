"""`--method awq`, and how checkpoints in AWQ's format are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from engine.quantize.options import QuantizeOptions
from engine.quantize.quantizer import gather
from engine.quantize.stages import LayerStages, LayerTensors
from quant.awq import stored_tensors
from quant.awq_search import round_clipped, search_scales
from quant.base import FormatError
from quant.rounding import RoundedMatrix
from quant.statistics import InputStatistics


class AwqOutput:
    """Implements `engine.quantize.quantizer.OutputFormat`: "gemm" packing, zero points stored."""

    IS_SYMMETRIC = False
    SETTINGS_FILE: str | None = None

    def stored_tensors(self, matrix: RoundedMatrix) -> dict[str, torch.Tensor]:
        return stored_tensors(matrix)

    def quantization_config(self, options: QuantizeOptions) -> dict[str, Any]:
        """AutoAWQ's keys."""
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": options.bits,
            "group_size": options.group_size,
            "zero_point": True,
            "modules_to_not_convert": None,
        }


class AwqQuantizer:
    """Sees a whole layer in full precision, then scales, clips and rounds it; as AutoAWQ, the next layer does too."""

    output = AwqOutput()

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
        num_inputs = weights[0].shape[1]
        source = self._stages.SOURCES[modules]
        source_weight = layer[f"{source}.weight"]
        if source_weight.shape[0] != num_inputs:  # grouped queries: an output of v_proj is several inputs of o_proj
            return torch.ones(num_inputs, device=source_weight.device)
        scales = search_scales(weights, self._statistics[modules], self._group_size)
        for module, weight in zip(modules, weights, strict=True):
            layer[f"{module}.weight"] = weight * scales
        for name in (f"{source}.weight", f"{source}.bias"):
            if name in layer:
                tensor = layer[name]
                layer[name] = tensor / (scales if tensor.dim() == 1 else scales[:, None])
        return scales
