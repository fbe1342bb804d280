"""Collectives of ranks on one host's CPU, through memory that they share: no system call while all ranks are on time.

Each rank has two slots for its contributions, used in turn, and a flag with the number of the last operation that it
has contributed to. An operation writes the rank's slot, raises its flag, waits for the other flags and reads the other
slots. A rank that has raised its flag to s has read everything of s - 1. So once all flags are at s - 1, the slot of
s - 2 is free.

The memory is a memfd of rank 0, which the others open through /proc. Nothing lies in the file system, and nothing is
left behind. Sums are in the order of the ranks, so a row's bits do not depend on what else is in the step.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit, prange

from parallel.atomics import load_flag, relax, store_flag
from parallel.state import RankLostError

SLOT_FLOATS = 1 << 20
"""Numbers in a slot, enough for a row of logits of any vocabulary."""
FLAG_STRIDE = 16
"""int64 from one flag to the next: each has its cache line, and the neighbouring one, which processors fetch along."""
SPINS = 20_000
"""Rounds of waiting before a rank gives its core away, about half a millisecond: the ranks are rarely further apart."""
SLEEP_S = 50e-6
PARALLEL_FLOATS = 1 << 16
"""Numbers from which all threads of a rank copy and add: one thread would hold up a prompt on many cores."""
PIECE = 1 << 12
"""Numbers that a thread copies or adds at a time."""

_FAST: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "cache": True}


@njit(**_FAST)
def _late_rank(flags, size, number, spins):  # type: ignore[no-untyped-def]
    """A rank whose flag stays below `number` for `spins` rounds, -1: none."""
    for rank in range(size):
        rounds = 0
        while load_flag(flags, rank * FLAG_STRIDE) < number:
            if rounds >= spins:
                return rank
            rounds += 1
            relax()
    return -1


@njit(**_FAST)
def _contribute(x, start, count, slots, slot, flags, rank, number):  # type: ignore[no-untyped-def]
    for i in range(count):
        slots[slot + i] = x[start + i]
    store_flag(flags, rank * FLAG_STRIDE, number)


@njit(**_FAST)
def _sum(slots, first, stride, size, out, start, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        out[start + i] = slots[first + i] + slots[first + stride + i]
    for rank in range(2, size):
        slot = first + rank * stride
        for i in range(count):
            out[start + i] += slots[slot + i]


@njit(**_FAST)
def _reduce(x, start, count, slots, first, stride, flags, rank, size, number, spins):  # type: ignore[no-untyped-def]
    """One part of an all-reduce as far as it goes without sleeping: the rank waited for, -1: all done."""
    late = _late_rank(flags, size, number - 1, spins)
    if late >= 0:
        return late
    _contribute(x, start, count, slots, first + rank * stride, flags, rank, number)
    late = _late_rank(flags, size, number, spins)
    if late < 0:
        _sum(slots, first, stride, size, x, start, count)
    return late


@njit(parallel=True, **_FAST)
def _copy_parallel(x, start, count, slots, slot):  # type: ignore[no-untyped-def]
    for piece in prange((count + PIECE - 1) // PIECE):
        for i in range(piece * PIECE, min(count, (piece + 1) * PIECE)):
            slots[slot + i] = x[start + i]


@njit(parallel=True, **_FAST)
def _sum_parallel(slots, first, stride, size, out, start, count):  # type: ignore[no-untyped-def]
    for piece in prange((count + PIECE - 1) // PIECE):
        begin = piece * PIECE
        _sum(slots, first + begin, stride, size, out, start + begin, min(PIECE, count - begin))


@njit(parallel=True, **_FAST)
def _place_parallel(slots, slot, num_rows, width, out, first_row, column, out_width):  # type: ignore[no-untyped-def]
    """Put rows of a slot into columns of `out`, flat [rows, out_width]."""
    for row in prange(num_rows):
        target = (first_row + row) * out_width + column
        for i in range(width):
            out[target + i] = slots[slot + row * width + i]


def memory_bytes(size: int) -> int:
    return 8 * FLAG_STRIDE * size + 4 * 2 * SLOT_FLOATS * size


class SharedMemoryCollectives:
    """Implements `parallel.state.Collectives` for float32 tensors in the CPU's memory.

    `fd` has `memory_bytes(size)` zeros. `is_crowded`: there are fewer cores than threads, so a rank that waits gives
    its core away at once.
    """

    name = "shared memory"

    def __init__(self, fd: int, rank: int, size: int, timeout_s: float, *, is_crowded: bool = False) -> None:
        self._rank, self._size = rank, size
        self.timeout_s = timeout_s
        self._spins = 0 if is_crowded else SPINS
        memory = mmap.mmap(fd, memory_bytes(size))
        flag_bytes = 8 * FLAG_STRIDE * size
        self._flags = np.frombuffer(memory, np.int64, FLAG_STRIDE * size)
        self._slots = np.frombuffer(memory, np.float32, offset=flag_bytes)
        self._parts = torch.from_numpy(self._slots).view(size, 2, SLOT_FLOATS)
        self._number = 0
        self._lost: str | None = None
        self._lost_lock = threading.Lock()

    def give_up(self, cause: str) -> None:
        """Let everyone who waits, now or later, raise RankLostError(cause). Called from another thread."""
        with self._lost_lock:
            self._lost = self._lost or cause

    def _wait(self, number: int) -> None:
        """Wait until every rank has contributed to operation `number`. Raises RankLostError."""
        late = _late_rank(self._flags, self._size, number, self._spins)
        deadline = time.monotonic() + self.timeout_s
        while late >= 0:
            if self._lost is not None:
                raise RankLostError(self._lost)
            if time.monotonic() > deadline:
                raise RankLostError(f"rank {late} hangs: the others have waited {self.timeout_s:g} s for it")
            if self._spins:
                time.sleep(SLEEP_S)
            else:
                os.sched_yield()
            late = _late_rank(self._flags, self._size, number, self._spins)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1).numpy()
        stride = 2 * SLOT_FLOATS
        for start in range(0, len(flat), SLOT_FLOATS):
            count = min(SLOT_FLOATS, len(flat) - start)
            self._number += 1
            first = self._number % 2 * SLOT_FLOATS
            shared = (self._slots, first, stride, self._flags, self._rank, self._size, self._number, self._spins)
            if count >= PARALLEL_FLOATS:
                self._give(flat, start, count, first + self._rank * stride)
                self._wait(self._number)
                _sum_parallel(self._slots, first, stride, self._size, flat, start, count)
            elif _reduce(flat, start, count, *shared) >= 0:
                self._reduce_late(flat, start, count, first)
        return x

    def _reduce_late(self, flat: Any, start: int, count: int, first: int) -> None:
        """Do the rest of `_reduce` once a rank is late; waits asleep."""
        stride = 2 * SLOT_FLOATS
        if self._flags[self._rank * FLAG_STRIDE] < self._number:
            self._give(flat, start, count, first + self._rank * stride)
        self._wait(self._number)
        _sum(self._slots, first, stride, self._size, flat, start, count)

    def _give(self, flat: Any, start: int, count: int, slot: int) -> None:
        """Contribute to this operation once the last one is over."""
        self._wait(self._number - 1)
        if count >= PARALLEL_FLOATS:
            _copy_parallel(flat, start, count, self._slots, slot)
            count = 0
        _contribute(flat, start, count, self._slots, slot, self._flags, self._rank, self._number)

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        out = torch.empty(x.shape[0], sum(widths))
        self._exchange(x, widths, out)
        return out

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        out = torch.empty(x.shape[0], sum(widths)) if self._rank == 0 else None
        self._exchange(x, widths, out)
        return out

    def _exchange(self, x: torch.Tensor, widths: Sequence[int], out: torch.Tensor | None) -> None:
        """Contribute x [rows, widths[rank]], and put those of all ranks side by side into `out`, if there is one."""
        rows_at_a_time = SLOT_FLOATS // max(widths)
        assert rows_at_a_time, "a row is longer than a slot"
        flat = x.contiguous().view(-1).numpy()
        width = widths[self._rank]
        for first in range(0, x.shape[0], rows_at_a_time):
            count = min(rows_at_a_time, x.shape[0] - first)
            self._number += 1
            turn = self._number % 2
            self._give(flat, first * width, count * width, (2 * self._rank + turn) * SLOT_FLOATS)
            if out is None:
                continue
            self._wait(self._number)
            column = 0
            for rank, other in enumerate(widths):
                slot = (2 * rank + turn) * SLOT_FLOATS
                if count * other >= PARALLEL_FLOATS:
                    _place_parallel(self._slots, slot, count, other, out.view(-1).numpy(), first, column, sum(widths))
                else:
                    part = self._parts[rank, turn, : count * other].view(count, other)
                    out[first : first + count, column : column + other] = part
                column += other
