"""What a model needs between its matrix products."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines of the rotary embedding: `cos`, `sin` [max_position, head_dim / 2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def build(cls, head_dim: int, theta: float, max_position: int, device: torch.device) -> RotaryTable:
        """Plain rotary embedding (Su et al. 2021), computed as `transformers` does, in float32."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), 1.0 / theta**exponents)
        return cls(angles.cos().to(device), angles.sin().to(device))


class Ops(Protocol):
    """Row-wise operations: a row's result does not depend on the other rows."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [rows, hidden] -> x / rms(x) * weight."""

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add x to `residual` [rows, hidden] in place; return the norm of the sum."""

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [rows, 2 * size] -> silu(first half) * second half, [rows, size]."""

    def rotate(self, qkv: torch.Tensor, positions: torch.Tensor, table: RotaryTable, num_heads: int) -> None:
        """Apply the rotary embedding in place to the first `num_heads` heads of qkv [rows, all heads * head_dim]."""
