"""`--method int8` and `int4`: each weight is rounded by itself, to its nearest number, and no data is needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.quantize.awq import AwqOutput
from engine.quantize.gptq import GptqOutput
from engine.quantize.options import QuantizeOptions
from engine.quantize.quantizer import OutputFormat
from engine.quantize.stages import LayerStages, LayerTensors
from quant.rounding import RoundedMatrix, round_to_nearest


class _NearestQuantizer:
    output: OutputFormat

    def __init__(self, options: QuantizeOptions, stages: LayerStages) -> None:
        self._options = options
        self._stages = stages

    def on_inputs(self, layer: LayerTensors, modules: tuple[str, ...], inputs: Iterator[torch.Tensor]) -> None:
        raise AssertionError("the inputs do not matter")

    def finish(self, layer: LayerTensors) -> dict[str, RoundedMatrix]:
        return {
            module: round_to_nearest(
                layer[f"{module}.weight"],
                bits=self._options.bits,
                group_size=self._options.group_size,
                is_symmetric=self.output.IS_SYMMETRIC,
            )
            for modules in self._stages.MATRICES
            for module in modules
        }


class Int8Quantizer(_NearestQuantizer):
    """Writes GPTQ's format."""

    output = GptqOutput()


class Int4Quantizer(_NearestQuantizer):
    """Writes AWQ's format."""

    output = AwqOutput()
