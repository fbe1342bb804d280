"""The protocol of the operations between matrix products, and what rotary positions are given to them as."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from quant.base import RowGroups


@dataclasses.dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines of the rotary embedding: `cos`, `sin` [num_rows, head_dim / 2] float32, usually by position."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of one step: token i takes row `rows[i]` of `table`; rows [num_tokens] int64."""

    table: RotaryTable
    rows: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    """The experts of a step's tokens. A pair is a token with one of its experts; pairs are sorted by expert."""

    groups: RowGroups
    """The pairs as a grouped product takes them; the sources are their tokens."""
    places: torch.Tensor
    """Where each token's pairs are, the likeliest expert first: [tokens, top_k] int32."""
    weights: torch.Tensor
    """The experts' weights in the same order: [tokens, top_k] float32."""


class ExpertOps(Protocol):
    """The operations of models with experts."""

    def route(self, logits: torch.Tensor, num_experts: int, top_k: int, *, is_normalized: bool) -> Routing:
        """Choose the `top_k` likeliest experts by the first `num_experts` columns of logits [tokens, columns].

        `is_normalized`: the weights of a token's experts add up to one; else they are their shares of all experts'.
        """

    def mix(self, outputs: torch.Tensor, routing: Routing) -> torch.Tensor:
        """outputs [pairs, size] -> the weighted sums of each token's, [tokens, size]."""

    def add_gated(self, x: torch.Tensor, y: torch.Tensor, logits: torch.Tensor, column: int) -> torch.Tensor:
        """Add y times the sigmoid of a column of logits [rows, columns] to x [rows, size] in place; return x."""


class Ops(ExpertOps, Protocol):
    """Row-wise operations: a row's result does not depend on the other rows."""

    def look_up(self, table: torch.Tensor, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows token_ids [tokens] int64 of table [vocab, hidden], in `dtype`: [tokens, hidden]."""

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The rows `rows` [n], int64 or int32, of x [*, size]: [n, size]."""

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add x to `residual` [rows, hidden] in place; return it."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [rows, hidden] -> x / rms(x) * weight."""

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add x to `residual` [rows, hidden] in place; return the norm of the sum."""

    def norm_heads(self, qkv: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """Norm the first heads of qkv [rows, all heads * head_dim] in place, each with its row of `weight`.

        weight [num_heads, head_dim].
        """

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [rows, 2 * size] -> silu(first half) * second half, [rows, size]."""

    def rotate(self, qkv: torch.Tensor, rotation: Rotation, num_heads: int) -> None:
        """Apply the rotary embedding in place to the first `num_heads` heads of qkv [rows, all heads * head_dim]."""
