"""The "int8" and "int4" layouts in plain torch: the reference implementation, for every device without a kernel."""

from __future__ import annotations

import torch
from torch.nn import functional

from quant.base import PackedWeight
from quant.packing import widen


class PackedTorch:
    """`x @ weight.T + bias` in the dtype of x, the weight widened at every call: memory stays small, speed does too."""

    rounding = None
    row_counts = ()

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        return []

    def __init__(self, packed: PackedWeight) -> None:
        self._packed = packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self._packed.bias is None else self._packed.bias.to(x.dtype)
        return functional.linear(x, widen(self._packed).to(x.dtype), bias)
