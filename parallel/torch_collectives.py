"""Collectives through torch.distributed: gloo on CPUs, NCCL on GPUs. The reference of `parallel.shared_memory`."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from parallel.state import RankLostError

FEW_NUMBERS = 1 << 16
"""Largest count of gathered numbers whose sum is one message to each rank; more are first summed in parts."""

T = TypeVar("T")

# One message into one tensor. The second name is that of older releases.
_all_gather: Callable[[torch.Tensor, torch.Tensor], object] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


class TorchCollectives:
    """Implements `parallel.state.Collectives` on torch's default process group, which it makes.

    Tensors go through the backend of their device: those of a GPU through NCCL, and in the same group those of the host
    through gloo, such as weights that are not on the GPU yet. With gloo the ranks' parts are added in the order of the
    ranks, whatever the size, so a row's bits do not depend on what else is in the step. Two ranks need no care, as
    a + b is b + a.

    The calls are fixed by the tensors' shapes, and nothing is read, so a graph can capture them.
    """

    def __init__(self, backend: str, store: Store, rank: int, size: int, timeout_s: float) -> None:
        """`backend` as torch takes it: `gloo` for tensors on any device, or `cpu:gloo,gpu:nccl`, the host's first."""
        self._backends = dict(pair.split(":") for pair in backend.split(",")) if ":" in backend else {}
        self.name = [backend, *self._backends.values()][-1]
        self._rank, self._size = rank, size
        self._timeout_s = timeout_s
        self._do(
            self.name,
            lambda: dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout_s)
            ),
        )

    @property
    def group_name(self) -> str:
        return str(dist.group.WORLD.group_name)  # type: ignore[union-attr]

    @property
    def timeout_s(self) -> float:
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._timeout_s = seconds
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds))

    def give_up(self, cause: str) -> None:
        """Do nothing: a rank that waits in a backend can't be woken."""

    def _backend_of(self, x: torch.Tensor) -> str:
        return self._backends.get(x.device.type, self.name)

    def _do(self, backend: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except torch.OutOfMemoryError:  # a RuntimeError, but of this rank
            raise
        except RuntimeError as error:  # of both backends, for a lost peer and for a timeout
            reason = str(error).splitlines()[0]
            raise RankLostError(f"{backend} lost another rank, or waited {self._timeout_s:g} s: {reason}") from error

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        backend = self._backend_of(x)
        if backend != "gloo" or self._size == 2:
            self._do(backend, lambda: dist.all_reduce(x))
            return x
        flat = x.reshape(-1)
        if flat.numel() * self._size <= FEW_NUMBERS:
            flat.copy_(_sum_in_order(self._gathered(flat)))
            return x
        part_size = -(-flat.numel() // self._size)
        padded = flat.new_zeros(self._size, part_size)
        padded.view(-1)[: flat.numel()] = flat
        received = torch.empty_like(padded)
        self._do(backend, lambda: dist.all_to_all_single(received, padded))
        flat.copy_(self._gathered(_sum_in_order(received)).view(-1)[: flat.numel()])
        return x

    def _gathered(self, flat: torch.Tensor) -> torch.Tensor:
        """Gather [n] of every rank into [size, n]."""
        gathered = flat.new_empty(self._size, flat.numel())
        self._do(self._backend_of(flat), lambda: _all_gather(gathered.view(-1), flat))
        return gathered

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        gathered = self._gathered(_padded(x, max(widths)).reshape(-1))
        return _side_by_side(gathered.view(self._size, x.shape[0], max(widths)), widths)

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        padded = _padded(x, max(widths))
        parts = [torch.empty_like(padded) for _ in widths] if self._rank == 0 else None
        self._do(self._backend_of(x), lambda: dist.gather(padded, parts))
        return None if parts is None else _side_by_side(parts, widths)


def _sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """Sum [size, n] to [n]: the first part, plus the second, plus the third, ..."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _side_by_side(parts: Iterable[torch.Tensor], widths: Sequence[int]) -> torch.Tensor:
    """Join [rows, max(widths)] of every rank to [rows, sum(widths)], without the padding."""
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)


def _padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """x with columns of zeros up to `width`: the ranks' tensors must be of one shape."""
    return torch.nn.functional.pad(x, (0, width - x.shape[1])).contiguous()
