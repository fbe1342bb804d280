"""AWQ (Lin et al. 2023, arXiv 2306.00978): inputs that matter are scaled up before rounding, so that they lose less.

The scales are folded into whatever makes those inputs, so the model stays the same and nothing of them is stored. The
loss is the squared error of the matrices' own outputs, which the Gram matrix of their inputs gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant.rounding import ROWS_AT_A_TIME, RoundedMatrix, asymmetric_grid, nearest, plain_groups, round_to_nearest
from quant.statistics import InputStatistics

NUM_RATIOS = 20
CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(11))
SCORED_PRODUCTS = 2**32
"""Multiplications for one candidate: of a matrix with many outputs only some are scored, evenly spread."""
MIN_SCORED = 128
EPSILON = 1e-4
BITS = 4


def search_scales(weights: Sequence[torch.Tensor], statistics: InputStatistics, group_size: int) -> torch.Tensor:
    """The scale [k] of each input with the smallest loss of `weights` [n, k] float32, which share the inputs."""
    size = weights[0].shape[1] if group_size == -1 else group_size
    gram, activity = statistics.gram, statistics.mean_abs
    weight = torch.cat(list(weights))
    groups = weight.abs().reshape(weight.shape[0], -1, size)
    magnitude = (groups / (groups.amax(dim=2, keepdim=True) + 1e-6)).flatten(1).mean(dim=0)
    del groups
    scored = weight[_spread(weight.shape[0], weight.shape[1], weight.device)]
    best = torch.ones_like(activity)
    min_loss = _loss(scored, best, gram, group_size)
    for step in range(NUM_RATIOS):
        ratio = step / NUM_RATIOS
        scales = activity.pow(ratio) / (magnitude.pow(1 - ratio) + EPSILON)
        scales = scales.clamp_min_(EPSILON)
        scales = scales / (scales.max() * scales.min()).sqrt()
        loss = _loss(scored, scales, gram, group_size)
        if loss < min_loss:
            best, min_loss = scales, loss
    return best


def _spread(num_outputs: int, num_inputs: int, device: torch.device) -> torch.Tensor:
    """Indices of the outputs that are scored."""
    count = min(num_outputs, max(MIN_SCORED, SCORED_PRODUCTS // num_inputs**2))
    return torch.linspace(0, num_outputs - 1, count, device=device).round().to(torch.int64)


def _loss(weight: torch.Tensor, scales: torch.Tensor, gram: torch.Tensor, group_size: int) -> float:
    """The squared error of the outputs if weight * scales is rounded and meets inputs / scales."""
    scaled = weight * scales
    size = scaled.shape[1] if group_size == -1 else group_size
    groups = scaled.reshape(scaled.shape[0], -1, size)
    scale, zero = asymmetric_grid(groups.amin(dim=2).clamp_max(0), groups.amax(dim=2).clamp_min(0), 1.0, BITS)
    rounded = nearest(groups, scale, zero, BITS).sub_(zero[..., None]).mul_(scale[..., None]).flatten(1)
    error = (rounded - scaled) / scales
    return float(((error @ gram) * error).sum(dtype=torch.float64))


def round_clipped(
    weight: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor, *, group_size: int, is_clipping: bool
) -> RoundedMatrix:
    """Round weight [n, k], scaled already, to 4 bits; each group's range is cut to the smallest loss of its outputs.

    A group's loss takes the Gram matrix of its own inputs, and so counts errors of like inputs as cancelling.
    """
    if not is_clipping:
        return round_to_nearest(weight, bits=BITS, group_size=group_size, is_symmetric=False)
    num_outputs, num_inputs = weight.shape
    size = num_inputs if group_size == -1 else group_size
    gram = gram / (scales[:, None] * scales)
    blocks = torch.stack([gram[first : first + size, first : first + size] for first in range(0, num_inputs, size)])
    parts = [_clip(rows.reshape(rows.shape[0], -1, size), blocks) for rows in torch.split(weight, ROWS_AT_A_TIME)]
    q, stored, zero_points = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    groups = plain_groups(num_inputs, group_size).to(weight.device)
    return RoundedMatrix(BITS, q.reshape(num_outputs, num_inputs), stored, zero_points, groups)


def _clip(groups: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups [rows, groups, size] by Gram blocks [groups, size, size]; returns q, scales and zero points."""
    low, high = groups.amin(dim=2).clamp_max_(0), groups.amax(dim=2).clamp_min_(0)
    scales, zeros = asymmetric_grid(low, high, 1.0, BITS)
    min_loss = torch.full_like(scales, torch.inf)
    for ratio in CLIP_RATIOS:
        scale, zero = asymmetric_grid(low, high, ratio, BITS)
        error = nearest(groups, scale, zero, BITS).sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups)
        by_group = error.transpose(0, 1)  # [groups, rows, size]
        loss = (torch.bmm(by_group, blocks) * by_group).sum(dim=2).T
        is_better = loss < min_loss
        scales, zeros = torch.where(is_better, scale, scales), torch.where(is_better, zero, zeros)
        min_loss = torch.minimum(loss, min_loss)
    return nearest(groups, scales, zeros, BITS).to(torch.uint8), scales.to(torch.float16), zeros.to(torch.int32)
