"""Statistics of a matrix's inputs, gathered batch by batch for the methods that quantize by data."""

from __future__ import annotations

import torch

GRAM_BLOCK = 1024
"""Inputs in a block of the Gram matrix; only the blocks on and above the diagonal are computed."""


class InputStatistics:
    """Sums over the inputs x of one or more matrices that share them, `num_inputs` wide.

    `gram` [k, k] float32 is the sum of x x^T. Up to a factor it is the Hessian of the squared error of a matrix's
    outputs in each of its rows (Frantar et al. 2022). `mean_abs` [k] is the mean size of each input (Lin et al. 2023).
    """

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        self._gram = torch.zeros(num_inputs, num_inputs, device=device)
        self._abs_sum = torch.zeros(num_inputs, device=device)
        self._num_rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Add a batch of inputs, x [rows, k] float32."""
        size = x.shape[1]
        for first in range(0, size, GRAM_BLOCK):
            rows = slice(first, min(first + GRAM_BLOCK, size))
            self._gram[rows, first:].addmm_(x[:, rows].T, x[:, first:])
        self._abs_sum += x.abs().sum(dim=0)
        self._num_rows += x.shape[0]

    @property
    def gram(self) -> torch.Tensor:
        upper = self._gram.triu()
        return upper + upper.T.tril(-1)

    @property
    def mean_abs(self) -> torch.Tensor:
        return self._abs_sum / max(self._num_rows, 1)
