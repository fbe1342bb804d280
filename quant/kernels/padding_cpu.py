"""Outputs filled up with zeros to whole tiles of a CPU kernel, and cut off again from what it computes."""

from __future__ import annotations

import torch
from numba import njit

from quant.kernels.arrays import FAST, call, flat_view, new_output


def padded(outputs: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """[n, ...] of any dtype -> [num_outputs, ...], zeros at the end; as it is if it has as many."""
    missing = num_outputs - len(outputs)
    return outputs if not missing else torch.cat([outputs, outputs.new_zeros(missing, *outputs.shape[1:])])


def without_padding(x: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """x [rows, outputs] float32 -> [rows, num_outputs], the first ones; as it is if it has no more."""
    num_rows, padded_size = x.shape
    if padded_size == num_outputs:
        return x
    out, flat_out = new_output(num_rows, num_outputs)
    call(_cut_padding, flat_view(x), padded_size, num_outputs, flat_out)
    return out


@njit(**FAST)
def _cut_padding(x, padded_size, n_size, out):  # type: ignore[no-untyped-def]
    """The first outputs of every row: x float32 flat [rows, padded_size] -> out flat [rows, n_size]."""
    for row in range(len(out) // n_size):
        for n in range(n_size):
            out[row * n_size + n] = x[row * padded_size + n]
