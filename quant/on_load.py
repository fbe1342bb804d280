"""Dense checkpoints quantized while they load: `eetq` and `int8` (8 bits, a scale per output), `int4` (groups of 64).

Nothing is calibrated, so no data is needed. One matrix is quantized at a time, so that memory peaks near the final
size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from quant.base import LinearMethod, MatrixShard, PackedWeight, ParamSpec
from quant.dense import dense_specs
from quant.packing import BYTE_CHUNK, pack_nibbles

INT4_GROUP_SIZES = (64, 32, 16)
"""Sizes in the order of preference: the first that divides the inputs, and the shard if that ends within a group."""
ROWS_AT_A_TIME = 512
"""Outputs that are widened to float32 together while a matrix is quantized."""


class _OnLoad(LinearMethod):
    """The part that both methods share: the stored tensors are those of a dense matrix."""

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        return dense_specs(in_features, out_features, has_bias)


class Int8Method(_OnLoad):
    """Quantizes symmetrically: the largest weight of an output becomes 127."""

    SIZE_FACTOR = 0.6

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        weight, bias = params["weight"], params.get("bias")
        if weight.shape[1] % BYTE_CHUNK:
            return PackedWeight("dense", weight.to(torch.float32), bias)
        max_abs = torch.cat([rows.abs().amax(dim=1, keepdim=True) for rows in _widened(weight)])
        if shard is not None:
            max_abs = shard.maximum(max_abs)
        scales = max_abs.clamp_min(1e-12) / 127
        q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for index, rows in enumerate(_widened(weight)):
            outputs = slice(index * ROWS_AT_A_TIME, (index + 1) * ROWS_AT_A_TIME)
            q[outputs] = (rows / scales[outputs]).round_().to(torch.int8)
        zero_points = torch.zeros(scales.shape, dtype=torch.int32, device=weight.device)
        return PackedWeight("int8", q, bias, scales, zero_points)


class Int4Method(_OnLoad):
    """Quantizes asymmetrically: a group's range becomes 0 to 15. Scales are rounded to float16 first, hence exact."""

    SIZE_FACTOR = 0.4

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        weight, bias = params["weight"], params.get("bias")
        num_outputs, num_inputs = weight.shape
        total_inputs = num_inputs if shard is None else shard.total_inputs
        common = math.gcd(total_inputs, num_inputs)
        group_size = next((size for size in INT4_GROUP_SIZES if common % size == 0), None)
        if group_size is None:
            return PackedWeight("dense", weight.to(torch.float32), bias)
        packed = torch.empty(num_outputs, num_inputs // 2, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(num_outputs, num_inputs // group_size, dtype=torch.float16, device=weight.device)
        zero_points = torch.empty(scales.shape, dtype=torch.int8, device=weight.device)
        for first in range(0, num_outputs, ROWS_AT_A_TIME):
            rows = slice(first, first + ROWS_AT_A_TIME)
            wide = weight[rows].to(torch.float32)
            groups = wide.reshape(wide.shape[0], -1, group_size)
            low = groups.amin(dim=2).clamp_max(0)
            high = groups.amax(dim=2).clamp_min(0)
            scales[rows] = ((high - low) / 15).clamp(6.2e-5, 65504).to(torch.float16)
            scale = scales[rows].to(torch.float32)
            zero = (-low / scale).round_().clamp_(0, 15)
            q = (groups / scale[:, :, None] + zero[:, :, None]).round_().clamp_(0, 15)
            packed[rows] = pack_nibbles(q.flatten(1))
            zero_points[rows] = zero.to(torch.int8)
        return PackedWeight("int4", packed, bias, scales, zero_points)


def _widened(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows in float32, some at a time."""
    starts = range(0, weight.shape[0], ROWS_AT_A_TIME)
    return (weight[start : start + ROWS_AT_A_TIME].to(torch.float32) for start in starts)
