"""Outputs filled up with zeros to whole tiles of a CPU kernel, and cut off again from what it computes."""

from __future__ import annotations

import torch
from numba import njit

from quant.kernels.arrays import FAST


def padded(outputs: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """[n, ...] -> [num_outputs, ...]; as it is if it has as many."""
    missing = num_outputs - len(outputs)
    return outputs if not missing else torch.cat([outputs, outputs.new_zeros(missing, *outputs.shape[1:])])


@njit(**FAST)
def cut_padding(padded, padded_size, n_size, out):  # type: ignore[no-untyped-def]
    """The first n_size outputs of every row."""
    for row in range(len(out) // n_size):
        for n in range(n_size):
            out[row * n_size + n] = padded[row * padded_size + n]
