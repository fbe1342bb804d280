"""Ranks as threads of one process."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from unittest import mock

import numpy as np
import torch
from numba import config

from parallel.state import ParallelState
from quant.kernels import packed_cpu
from quant.kernels.dense_rows import TILE_OUTPUTS

TIMEOUT_S = 60.0

T = TypeVar("T")
Part = tuple[str, torch.Tensor]


class ThreadCollectives:
    """`parallel.state.Collectives` of threads; `parts` and `barrier` are the same for all of them."""

    name = "threads"
    timeout_s = TIMEOUT_S

    def __init__(self, rank: int, parts: list[Part | None], barrier: threading.Barrier) -> None:
        self._rank = rank
        self._parts = parts
        self._barrier = barrier

    def _exchange(self, kind: str, x: torch.Tensor) -> list[torch.Tensor]:
        """What every rank passed; nobody goes on before all have taken it."""
        self._parts[self._rank] = kind, x.clone()
        self._barrier.wait(self.timeout_s)
        parts = [part for part in self._parts if part is not None]
        self._barrier.wait(self.timeout_s)
        assert {other for other, _ in parts} == {kind}, "the ranks make different calls"
        return [part for _, part in parts]

    def give_up(self, cause: str) -> None:
        self._barrier.abort()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._exchange("all_reduce", x)
        return x.copy_(functools.reduce(operator.add, parts))

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return _side_by_side(self._exchange("all_gather", x), widths)

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        parts = self._exchange("gather", x)
        return _side_by_side(parts, widths) if self._rank == 0 else None


def _side_by_side(parts: list[torch.Tensor], widths: Sequence[int]) -> torch.Tensor:
    assert [part.shape[1] for part in parts] == list(widths)
    return torch.cat(parts, dim=1)


def run_ranks(size: int, work: Callable[[ParallelState], T]) -> list[T]:
    """What `work` returns on each rank. Raises the error of the first rank that fails."""
    barrier = threading.Barrier(size)
    parts: list[Part | None] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> T:
        collectives = ThreadCollectives(rank, parts, barrier) if size > 1 else None
        try:
            return work(ParallelState(rank, size, collectives))
        except BaseException as error:
            errors.append(error)
            barrier.abort()
            raise

    # Layers of one process share this memory, as they run one after the other; here ranks run side by side.
    with mock.patch.object(packed_cpu, "thread_scratch", _own_scratch), ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def _own_scratch(k_size: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.empty(config.NUMBA_NUM_THREADS * TILE_OUTPUTS * k_size, dtype=np.float32)
