"""What a method of `text-generation-server quantize` must offer: it rounds layers, and knows how they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from engine.quantize.methods import METHODS
from engine.quantize.options import QuantizeOptions
from engine.quantize.stages import LayerStages, LayerTensors
from quant.registry import load_entry
from quant.rounding import RoundedMatrix
from quant.statistics import InputStatistics


class OutputFormat(Protocol):
    """The format in which rounded matrices are written."""

    IS_SYMMETRIC: bool
    """Whether the zero points of what is written lie in the middle."""
    SETTINGS_FILE: str | None
    """A file that repeats what config.json says, as the format's own tool writes it; None: there is none."""

    def stored_tensors(self, matrix: RoundedMatrix) -> dict[str, torch.Tensor]:
        """The tensors of a matrix by name, without its module's; no bias."""

    def quantization_config(self, options: QuantizeOptions) -> dict[str, Any]:
        """What config.json says, with the keys of the format's own tool."""


class Quantizer(Protocol):
    """One model's rounding; `on_inputs` and `finish` are called in turn for each layer."""

    output: OutputFormat

    def __init__(self, options: QuantizeOptions, stages: LayerStages) -> None: ...

    def on_inputs(self, layer: LayerTensors, modules: tuple[str, ...], inputs: Iterator[torch.Tensor]) -> None:
        """Look at the inputs [rows, k] of `modules`; may change the layer. Raises FormatError."""

    def finish(self, layer: LayerTensors) -> dict[str, RoundedMatrix]:
        """Round each matrix; may change the other tensors of the layer."""


def make_quantizer(options: QuantizeOptions, stages: LayerStages) -> Quantizer:
    """The quantizer of the method that the options name."""
    quantizer: Quantizer = load_entry(METHODS[options.method].quantizer)(options, stages)
    return quantizer


def gather(inputs: Iterator[torch.Tensor], weight: torch.Tensor) -> InputStatistics:
    """The statistics of the inputs [rows, k] of a matrix [n, k]."""
    statistics = InputStatistics(weight.shape[1], weight.device)
    for x in inputs:
        statistics.add(x)
    return statistics
