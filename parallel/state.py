"""The rank of this process, and the collectives. Layers get both as an argument, never as a global."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch


class RankLostError(RuntimeError):
    """Another rank is gone, hangs or can't be reached; the text says which one, and how that was noticed."""


class Collectives(Protocol):
    """Sums and gathers over all ranks. Every rank makes the same calls in the same order.

    Raises RankLostError when a rank doesn't take part within `timeout_s`.
    """

    name: str
    timeout_s: float

    def give_up(self, cause: str) -> None:
        """Let waiting collectives raise RankLostError(cause) if their library allows that. For another thread."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in x's memory; every rank gets the same bits."""

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """x [rows, widths[rank]] of every rank side by side -> [rows, sum(widths)]."""

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        """Gather as `all_gather` does, for rank 0 alone; the others get None and need not wait."""


@dataclasses.dataclass(frozen=True, slots=True)
class ParallelState:
    """`rank` of `size` tensor-parallel processes; size 1 is the same code without the collectives."""

    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.collectives is None else self.collectives.all_reduce(x)

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return x if self.collectives is None else self.collectives.all_gather(x, widths)

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """x of every rank side by side on rank 0; no rows on the others."""
        if self.collectives is None:
            return x
        gathered = self.collectives.gather(x, widths)
        return x.new_empty(0, sum(widths)) if gathered is None else gathered

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        """The largest over the ranks, element by element; x of any shape, the same on every rank."""
        if self.collectives is None:
            return x
        gathered = self.collectives.all_gather(x.reshape(1, -1), [x.numel()] * self.size)
        return gathered.reshape(self.size, *x.shape).amax(dim=0)
