"""`--method gptq`, and how checkpoints in GPTQ's format are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from engine.quantize.options import QuantizeOptions
from engine.quantize.quantizer import gather
from engine.quantize.stages import LayerStages, LayerTensors
from quant.gptq import stored_tensors
from quant.gptq_solver import solve
from quant.rounding import RoundedMatrix

QUANTIZER = "pytgi:0.1"
"""Who wrote a checkpoint, in the form gptqmodel gives it."""


class GptqOutput:
    """Implements `engine.quantize.quantizer.OutputFormat`: version 1, symmetric."""

    IS_SYMMETRIC = True
    SETTINGS_FILE: str | None = "quantize_config.json"

    def stored_tensors(self, matrix: RoundedMatrix) -> dict[str, torch.Tensor]:
        return stored_tensors(matrix)

    def quantization_config(self, options: QuantizeOptions) -> dict[str, Any]:
        """AutoGPTQ's keys and those that gptqmodel added."""
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


class GptqQuantizer:
    """Rounds each matrix as soon as its inputs are known: the next one sees what it became (true sequential)."""

    output = GptqOutput()

    def __init__(self, options: QuantizeOptions, stages: LayerStages) -> None:
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
