"""Rounding a matrix to a few bits, group by group of inputs, without data, and the rounded matrix."""

from __future__ import annotations

import dataclasses

import torch

MIN_SCALE = 2.0**-14
"""The smallest float16 that keeps all its bits; a group below it becomes zeros."""
MAX_SCALE = 65504.0
RANGE_RATIOS = tuple(1.0 - 0.04 * step for step in range(-2, 13))
"""Parts of a group's range that are tried: a narrower range clips the largest weights and is finer for all others."""
ROWS_AT_A_TIME = 1024
"""Outputs that are searched together."""


@dataclasses.dataclass(frozen=True, slots=True)
class RoundedMatrix:
    """`scales * (q - zero_points)`: q [n, k] uint8, scales [n, groups] float16, zero_points [n, groups] int32 unsigned.

    `group_of_input` [k] int64 says which group an input is in.
    """

    bits: int
    q: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    group_of_input: torch.Tensor

    def widen(self) -> torch.Tensor:
        """The float32 weight [n, k] that these numbers stand for."""
        scales = self.scales.to(torch.float32)[:, self.group_of_input]
        return scales * (self.q.to(torch.float32) - self.zero_points.to(torch.float32)[:, self.group_of_input])

    def cpu(self) -> RoundedMatrix:
        """A copy in the CPU's memory, where matrices are packed."""
        names = ("q", "scales", "zero_points", "group_of_input")
        return dataclasses.replace(self, **{name: getattr(self, name).cpu() for name in names})

    def rows(self, outputs: slice) -> RoundedMatrix:
        """The part with these outputs."""
        return dataclasses.replace(
            self, q=self.q[outputs], scales=self.scales[outputs], zero_points=self.zero_points[outputs]
        )


def plain_groups(num_inputs: int, group_size: int) -> torch.Tensor:
    """The group of each input, [k] int64: inputs in order, `group_size` to a group; -1: all in one."""
    return torch.arange(num_inputs) // (num_inputs if group_size == -1 else group_size)


def round_symmetric(groups: torch.Tensor, importance: torch.Tensor | float, bits: int) -> torch.Tensor:
    """The scales [...] float32 (exact in float16) with the smallest loss of `groups` [..., size], zero in the middle.

    The loss is the squared error of each weight times its `importance`, a number for all or [..., size] (broadcast).
    """
    half = 2.0 ** (bits - 1)
    widest = groups.abs().amax(dim=-1) / (half - 0.5)
    best, min_loss = _storable(widest), torch.full_like(widest, torch.inf)
    for ratio in RANGE_RATIOS:
        scale = _storable(widest * ratio)
        q = (groups / scale[..., None]).round_().clamp_(-half, half - 1)
        loss = q.mul_(scale[..., None]).sub_(groups).square_().mul_(importance).sum(dim=-1)
        best = torch.where(loss < min_loss, scale, best)
        min_loss = torch.minimum(loss, min_loss)
    return best


def round_to_nearest(weight: torch.Tensor, *, bits: int, group_size: int, is_symmetric: bool) -> RoundedMatrix:
    """Round each of weight [n, k] float32 by itself, to its nearest number."""
    num_outputs, num_inputs = weight.shape
    size = num_inputs if group_size == -1 else group_size
    parts = [
        (_symmetric if is_symmetric else _asymmetric)(rows.reshape(rows.shape[0], -1, size), bits)
        for rows in torch.split(weight, ROWS_AT_A_TIME)
    ]
    q, scales, zero_points = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    groups = plain_groups(num_inputs, group_size).to(weight.device)
    return RoundedMatrix(bits, q.reshape(num_outputs, num_inputs), scales, zero_points, groups)


def _symmetric(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    half = 2 ** (bits - 1)
    scales = round_symmetric(groups, 1.0, bits)
    q = (groups / scales[..., None]).round_().clamp_(-half, half - 1) + half
    return q.to(torch.uint8), scales.to(torch.float16), torch.full_like(scales, half, dtype=torch.int32)


def _asymmetric(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Map each group's range to 0 to 2**bits - 1; it holds zero, and is shrunk as far as that lessens the loss."""
    low = groups.amin(dim=-1).clamp_max_(0)
    high = groups.amax(dim=-1).clamp_min_(0)
    scales, zeros = asymmetric_grid(low, high, 1.0, bits)
    min_loss = torch.full_like(scales, torch.inf)
    for ratio in RANGE_RATIOS:
        scale, zero = asymmetric_grid(low, high, ratio, bits)
        difference = nearest(groups, scale, zero, bits).sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups)
        loss = difference.square_().sum(dim=-1)
        is_better = loss < min_loss
        scales, zeros = torch.where(is_better, scale, scales), torch.where(is_better, zero, zeros)
        min_loss = torch.minimum(loss, min_loss)
    q = nearest(groups, scales, zeros, bits)
    return q.to(torch.uint8), scales.to(torch.float16), zeros.to(torch.int32)


def asymmetric_grid(
    low: torch.Tensor, high: torch.Tensor, ratio: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (exact in float16) and zero point, both float32, of `ratio` of the range from low <= 0 to high >= 0."""
    max_q = 2**bits - 1
    scale = _storable((high - low) * (ratio / max_q))
    return scale, (-low * ratio / scale).round_().clamp_(0, max_q)


def nearest(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest q of groups [..., size], float32; scale and zero [...]."""
    return (groups / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, 2**bits - 1)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    """The scale rounded to float16, as it is stored, so that the rounding of weights makes up for it."""
    return scale.clamp(MIN_SCALE, MAX_SCALE).to(torch.float16).to(torch.float32)
