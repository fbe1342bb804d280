"""The operations in plain torch: the reference implementation, which also runs on every device without kernels."""

from __future__ import annotations

import torch
from torch.nn import functional

from engine.layers.base import Rotation
from engine.layers.experts_torch import TorchExpertOps


class TorchOps(TorchExpertOps):
    """`base.Ops` in torch; norms and rotations in float32 whatever the dtype of x."""

    def look_up(self, table: torch.Tensor, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return table[token_ids].to(dtype)

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x[rows]

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual.add_(x)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def norm_heads(self, qkv: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        heads = qkv[:, : weight.numel()].view(qkv.shape[0], *weight.shape)
        heads.copy_(self.rms_norm(heads, weight, eps))

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def rotate(self, qkv: torch.Tensor, rotation: Rotation, num_heads: int) -> None:
        table = rotation.table
        half = table.cos.shape[1]
        heads = qkv[:, : num_heads * 2 * half].view(qkv.shape[0], num_heads, 2, half)
        cos = table.cos[rotation.rows].unsqueeze(1)  # [rows, 1, half]
        sin = table.sin[rotation.rows].unsqueeze(1)
        first, second = heads.to(torch.float32).unbind(2)
        rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=2)
        heads.copy_(rotated)
