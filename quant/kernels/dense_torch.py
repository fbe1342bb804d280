"""The dense layout in plain torch: the reference implementation, which also runs on every device without a kernel."""

from __future__ import annotations

import torch
from torch.nn import functional

from quant.base import PackedWeight


class DenseTorch:
    """`x @ weight.T + bias` in the dtype of x."""

    rounding = None
    row_counts = ()

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        return []

    def __init__(self, packed: PackedWeight) -> None:
        self._weight = packed.weight
        self._bias = packed.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self._bias is None else self._bias.to(x.dtype)
        return functional.linear(x, self._weight.to(x.dtype), bias)
