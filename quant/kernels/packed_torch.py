"""The "bytes" and "nibbles" layouts in plain torch: the twin of the CPU kernels, and what other devices run."""

from __future__ import annotations

import torch
from torch.nn import functional

from quant.base import PackedWeight
from quant.packing import widen


class PackedTorch:
    """`x @ weight.T + bias` in the dtype of x, the weight widened at every call: memory stays small, speed does too."""

    def __init__(self, packed: PackedWeight) -> None:
        self._packed = packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self._packed.bias is None else self._packed.bias.to(x.dtype)
        return functional.linear(x, widen(self._packed).to(x.dtype), bias)
