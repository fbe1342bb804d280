"""The quantized layouts in plain torch: the reference implementation, for every device without a kernel."""

from __future__ import annotations

import torch
from torch.nn import functional

from quant.base import PackedWeight
from quant.packing import OUTPUTS_AT_A_TIME, widen


class PackedTorch:
    """`x @ weight.T + bias` in the dtype of x, the weight widened at every call: memory stays small, speed does too.

    Some outputs are widened at a time.
    """

    rounding = None
    row_counts = ()

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        return []

    def __init__(self, packed: PackedWeight) -> None:
        starts = range(0, packed.weight.shape[0], OUTPUTS_AT_A_TIME)
        self._parts = [packed.outputs(slice(first, first + OUTPUTS_AT_A_TIME)) for first in starts]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        products = [_product(x, part) for part in self._parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _product(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    bias = None if packed.bias is None else packed.bias.to(x.dtype)
    return functional.linear(x, widen(packed).to(x.dtype), bias)
