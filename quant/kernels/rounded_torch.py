"""Products with activations rounded to 8 bits, in plain torch: the reference implementation of `integer_cpu`."""

from __future__ import annotations

import torch

from quant.base import PackedWeight
from quant.kernels.packed_torch import PackedTorch

GROUPS = (128, 64, 32)
"""Numbers of inputs that share the scale of a rounded activation: the first that divides a weight's group is taken."""
MIN_ROUNDED = 1e-30
"""A group whose activations are all below it counts as zeros: 127 over its maximum might not be a float32."""


def activation_group(group_size: int) -> int | None:
    """The number of inputs that are rounded together where `group_size` share a weight's scale; None: none can be."""
    return next((group for group in GROUPS if group_size % group == 0), None)


def round_activations(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, k] float32 -> integers -127 to 127 [rows, k / group, group] and scales [rows, k / group], float32.

    A NaN or an infinity makes its group's scale NaN.
    """
    groups = x.reshape(x.shape[0], -1, group)
    maxima = groups.abs().amax(dim=2)
    # `127 / maxima` would be rounded twice: torch multiplies with the reciprocal.
    inverse = torch.where(maxima < MIN_ROUNDED, 0.0, torch.full_like(maxima, 127).div(maxima))
    integers = (groups * inverse[:, :, None]).round()
    return integers, torch.where(maxima.isfinite(), maxima * (1 / 127), torch.nan)


class RoundedTorch:
    """`x @ weight.T + bias` for the layouts "int8" and "int4" on the rounded x."""

    def __init__(self, packed: PackedWeight) -> None:
        assert packed.scales is not None
        self._product = PackedTorch(packed)
        self._input_order = packed.input_order
        group = activation_group(packed.num_inputs // packed.scales.shape[1])
        assert group is not None
        self._group = group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ordered = x if self._input_order is None else x[:, self._input_order]
        integers, scales = round_activations(ordered.to(torch.float32), self._group)
        rounded = (integers * scales[:, :, None]).flatten(1)
        if self._input_order is not None:
            rounded = torch.empty_like(rounded).index_copy_(1, self._input_order, rounded)
        return self._product(rounded.to(x.dtype))
