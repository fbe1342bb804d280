"""How close a kernel must come to its reference in float64."""

from __future__ import annotations

import torch

RELATIVE = {torch.float32: 1e-6, torch.float16: 1e-3}
"""Error over the largest number of the reference."""


def assert_close(result: torch.Tensor, expected: torch.Tensor, *, num_roundings: int = 1) -> None:
    """Float32 and float16 by `RELATIVE`, bfloat16 within one unit of the last place.

    The interpreter cuts bfloat16 off where a GPU rounds, so a unit is as close as it gets. Numbers that are rounded on
    the way, too, may be off by as much again.
    """
    assert result.shape == expected.shape
    assert result.isfinite().all(), "a number was not written"
    error = (result.double() - expected).abs()
    largest = expected.abs().max() if expected.numel() else 0.0
    if result.dtype == torch.bfloat16:
        unit = 2.0 ** (expected.abs().clamp_min(1e-30).log2().floor() - 7)
        earlier = (num_roundings - 1) * 2.0**-6.9 * expected.abs()
        assert (error <= unit + earlier + 1e-6 * largest).all(), error.max()
    else:
        assert (error <= num_roundings * RELATIVE[result.dtype] * largest + 1e-30).all(), error.max() / largest
