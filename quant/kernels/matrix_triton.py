"""All layouts in Triton, on GPUs: few rows by `skinny_triton`, more by `widen_triton`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from quant.base import PackedWeight
from quant.kernels.skinny_triton import BLOCK_ROWS, MAX_ROWS, min_block_inputs, skinny_product
from quant.kernels.tuning import WeightShape, tile_for
from quant.kernels.widen_triton import widened_product


class MatrixTriton:
    """`x @ weight.T + bias`, summed in float32."""

    rounding = None
    row_counts = (1, *(count + 1 for count in BLOCK_ROWS))

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        if packed.zero_points is not None and packed.zero_points.is_floating_point():
            return ["weights have offsets in place of zero points"]
        return []

    def __init__(self, packed: PackedWeight) -> None:
        self._packed = as_indexed(packed)
        num_inputs, scales = packed.num_inputs, packed.scales
        num_groups = 1 if scales is None else scales.shape[1]
        self._group_size = num_inputs // num_groups if num_groups > 1 else 0
        weight = WeightShape(
            packed.layout, packed.weight.shape[0], num_inputs, self._group_size, packed.input_order is not None
        )
        self._tile = tile_for(weight, packed.architecture, min_inputs=min_block_inputs(packed.layout))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        packed, x = self._packed, x.contiguous()
        out = x.new_empty(x.shape[0], packed.weight.shape[0], dtype=packed.out_dtype or x.dtype)
        if x.shape[0] > MAX_ROWS:
            widened_product(packed, self._group_size, x, out)
        elif x.shape[0]:
            skinny_product(packed, self._group_size, self._tile, x, out)
        return out


def as_indexed(packed: PackedWeight) -> PackedWeight:
    """The weight as kernels index it: formats that store scales by group leave them transposed.

    Kernels gather inputs by numbers of 32 bits, which take half as many registers.
    """
    fields = ((field.name, getattr(packed, field.name)) for field in dataclasses.fields(packed))
    tensors: dict[str, Any] = {name: value.contiguous() for name, value in fields if isinstance(value, torch.Tensor)}
    if packed.input_order is not None:
        tensors["input_order"] = packed.input_order.to(torch.int32)
    return dataclasses.replace(packed, **tensors)
