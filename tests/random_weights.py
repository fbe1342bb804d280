"""Packed weights of random numbers, in every layout."""

from __future__ import annotations

import torch

from quant.base import PackedWeight


def random_packed(layout: str, num_outputs: int, num_inputs: int, *, has_order: bool = False) -> PackedWeight:
    """With a bias. Groups are of 32 inputs; in "int8" an output has one scale."""
    bias, order = torch.randn(num_outputs), torch.randperm(num_inputs) if has_order else None
    if layout == "dense":
        return PackedWeight(layout, torch.randn(num_outputs, num_inputs), bias, input_order=order)
    size = num_inputs // 2 if layout == "int4" else num_inputs
    stored = torch.randint(0, 256, (num_outputs, size), dtype=torch.uint8)
    if layout == "fp8":
        stored = stored.where(stored & 127 != 127, 0)  # no NaN
    num_groups = 1 if layout == "int8" else num_inputs // 32
    scales = torch.rand(num_outputs, num_groups) + 0.5
    zeros = torch.zeros(scales.shape) if layout == "fp8" else torch.randint(0, 15, scales.shape)
    weight = stored.view(torch.int8) if layout == "int8" else stored
    zero_points = zeros.to(torch.int8 if layout == "int4" else torch.int32)
    return PackedWeight(layout, weight, bias, scales, zero_points, order)
