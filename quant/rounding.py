"""Rounding a matrix to a few bits, group by group of inputs, and what comes out of it. No data beyond importances."""

from __future__ import annotations

import dataclasses

import torch

MIN_SCALE = 2.0**-14
"""The least float16 that keeps all its bits; a group below it becomes zeros."""
MAX_SCALE = 65504.0
RANGE_RATIOS = tuple(1.0 - 0.04 * step for step in range(-2, 13))
"""Shares of a group's range that are tried: a narrower range clips the largest weights and is finer for all others."""
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
        """The float32 weight [n, k] that a checkpoint with these numbers stands for."""
        scales = self.scales.to(torch.float32)[:, self.group_of_input]
        return scales * (self.q.to(torch.float32) - self.zero_points.to(torch.float32)[:, self.group_of_input])

    def cpu(self) -> RoundedMatrix:
        """The same in the CPU's memory, where it is packed."""
        names = ("q", "scales", "zero_points", "group_of_input")
        return dataclasses.replace(self, **{name: getattr(self, name).cpu() for name in names})

    def rows(self, outputs: slice) -> RoundedMatrix:
        """Some of the outputs."""
        return dataclasses.replace(
            self, q=self.q[outputs], scales=self.scales[outputs], zero_points=self.zero_points[outputs]
        )


def plain_groups(num_inputs: int, group_size: int) -> torch.Tensor:
    """[k] int64: inputs in order, `group_size` to a group; -1: all in one."""
    return torch.arange(num_inputs) // (num_inputs if group_size == -1 else group_size)


def round_symmetric(groups: torch.Tensor, importance: torch.Tensor, bits: int) -> torch.Tensor:
    """The scales [...] float32 (exact in float16) with which `groups` [..., size] lose least, zero in the middle.

    What is lost is the squared error of each weight times its `importance` [..., size] (broadcast).
    """
    half = 2.0 ** (bits - 1)
    widest = groups.abs().amax(dim=-1) / (half - 0.5)
    best, least = _storable(widest), torch.full_like(widest, torch.inf)
    for ratio in RANGE_RATIOS:
        scale = _storable(widest * ratio)
        q = (groups / scale[..., None]).round_().clamp_(-half, half - 1)
        loss = q.mul_(scale[..., None]).sub_(groups).square_().mul_(importance).sum(dim=-1)
        best = torch.where(loss < least, scale, best)
        least = torch.minimum(loss, least)
    return best


def round_to_nearest(
    weight: torch.Tensor, *, bits: int, group_size: int, is_symmetric: bool, importance: torch.Tensor | None = None
) -> RoundedMatrix:
    """weight [n, k] float32 -> each weight alone to its nearest number; `importance` [k] weighs the errors."""
    num_outputs, num_inputs = weight.shape
    size = num_inputs if group_size == -1 else group_size
    factors = torch.ones(num_inputs, device=weight.device) if importance is None else importance
    of_group = factors.reshape(-1, size)
    parts = [
        (_symmetric if is_symmetric else _asymmetric)(rows.reshape(rows.shape[0], -1, size), of_group, bits)
        for rows in torch.split(weight, ROWS_AT_A_TIME)
    ]
    q, scales, zero_points = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    groups = plain_groups(num_inputs, group_size).to(weight.device)
    return RoundedMatrix(bits, q.reshape(num_outputs, num_inputs), scales, zero_points, groups)


def _symmetric(
    groups: torch.Tensor, importance: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    half = 2 ** (bits - 1)
    scales = round_symmetric(groups, importance, bits)
    q = (groups / scales[..., None]).round_().clamp_(-half, half - 1) + half
    return q.to(torch.uint8), scales.to(torch.float16), torch.full_like(scales, half, dtype=torch.int32)


def _asymmetric(
    groups: torch.Tensor, importance: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each group's range, shrunk to what loses least, becomes 0 to 2**bits - 1; it always holds zero."""
    low = groups.amin(dim=-1).clamp_max_(0)
    high = groups.amax(dim=-1).clamp_min_(0)
    scales, zeros = asymmetric_grid(low, high, 1.0, bits)
    least = torch.full_like(scales, torch.inf)
    for ratio in RANGE_RATIOS:
        scale, zero = asymmetric_grid(low, high, ratio, bits)
        difference = nearest(groups, scale, zero, bits).sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups)
        loss = difference.square_().mul_(importance).sum(dim=-1)
        is_better = loss < least
        scales, zeros = torch.where(is_better, scale, scales), torch.where(is_better, zero, zeros)
        least = torch.minimum(loss, least)
    q = nearest(groups, scales, zeros, bits)
    return q.to(torch.uint8), scales.to(torch.float16), zeros.to(torch.int32)


def asymmetric_grid(
    low: torch.Tensor, high: torch.Tensor, ratio: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (exact in float16) and zero point, both float32, of `ratio` of the range from low <= 0 to high >= 0."""
    most = 2**bits - 1
    scale = _storable((high - low) * (ratio / most))
    return scale, (-low * ratio / scale).round_().clamp_(0, most)


def nearest(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """groups [..., size] -> the nearest q, float32; scale and zero [...]."""
    return (groups / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, 2**bits - 1)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, as it is stored, so that the rounding of weights makes up for it."""
    return scale.clamp(MIN_SCALE, MAX_SCALE).to(torch.float16).to(torch.float32)
