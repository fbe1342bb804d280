"""FP8 checkpoints (`quant_method` "fp8"): 8-bit floats with scales by block, as Qwen's own are, or by matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.base import FormatError
from quant.scaled import WHOLE, ScaledMethod
from quant.settings import read_block

SCALES = ("weight_scale_inv", "weight_scale")
"""The scale that a weight is multiplied with: the first name, an inverse to those who quantize, is `transformers`'."""
ACTIVATION_SCALES = ("activation_scale", "input_scale")
FLOATS = "e4m3"


class Fp8Format:
    """Implements `quant.base.CheckpointFormat`."""

    MARKER = SCALES

    def __init__(self, settings: Mapping[str, Any]) -> None:
        floats = settings.get("fmt") or FLOATS
        if floats != FLOATS:
            raise FormatError(f"the checkpoint has 8-bit floats {floats!r}; only {FLOATS} can be loaded")
        block, blocks = (WHOLE, WHOLE), "one scale a matrix"
        if settings.get("weight_block_size") is not None:
            block = read_block(settings, "weight_block_size")
            blocks = f"blocks of {block[0]} x {block[1]}"
        self._method = ScaledMethod(block, is_float=True, scale_names=SCALES, ignored_names=ACTIVATION_SCALES)
        self.description = f"fp8, {blocks}, weights only"

    @staticmethod
    def is_recognized(settings: Mapping[str, Any]) -> bool:
        return False

    def size_factor(self, *, is_exact: bool) -> float:
        return 1.0

    def method_for(self, module: str) -> ScaledMethod:
        return self._method
