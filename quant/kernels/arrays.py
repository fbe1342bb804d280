"""The ground floor of all CPU kernels: Numba's settings, the memory of tensors as flat arrays, calls of kernels.

An observer sees the calls that Python makes within a block, so that a `program_cpu.Program` can make them again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

FAST: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "cache": True}
"""Numba's settings for every kernel."""

SLAB_BYTES = 32 << 20
"""Memory that matrices share. Larger ones have their own; it is given back when none of its matrices is left."""
MIN_SHARED_BYTES = 1 << 17
"""Smaller matrices have their own: a model that has only such lies in the caches."""
LINE_BYTES = 64
"""A line of the processor's cache."""
READABLE_BYTES = 16 * LINE_BYTES
"""Bytes behind an array that a kernel may read, and not use: a tile of AMX that begins with an array's last row."""

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


class CallObserver(Protocol):
    """Sees the calls of kernels, and says where they write."""

    def take(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        """Take note of a call that was made."""

    def new_array(self, num_rows: int | None, size: int) -> npt.NDArray[np.float32]:
        """An array of `new_rows`; None: it has one row, however many the step has."""


_observer: CallObserver | None = None


@contextlib.contextmanager
def observed_calls(observer: CallObserver) -> Iterator[None]:
    """Let `observer` see the calls within this block."""
    global _observer
    assert _observer is None, "observers do not nest"
    _observer = observer
    try:
        yield
    finally:
        _observer = None


def call(kernel: Any, *arguments: Any) -> None:
    """Call a compiled function. Every kernel that a layer of a model needs is called through this.

    A kernel learns the number of rows from the sizes of its arrays, not from a number: a program makes the same call
    for steps of other sizes.
    """
    kernel(*arguments)
    if _observer is not None:
        _observer.take(kernel, arguments)


_slab: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
"""What is left of the memory that the next matrices share."""
_slab_lock = threading.Lock()


def new_weight(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialised memory for a matrix that stays: matrices lie one after the other in large pieces, line by line.

    NumPy asks for huge pages where an array is large, as one matrix often is not. A product whose weights lie in them
    takes 0.88 to 0.99 of the time: the processor asks for less than it would across the borders of small pages.
    """
    global _slab
    size = -(-num_bytes // LINE_BYTES) * LINE_BYTES
    if not MIN_SHARED_BYTES <= size <= SLAB_BYTES // 2:
        return new_lines(num_bytes)
    with _slab_lock:
        if size > len(_slab):
            _slab = new_lines(SLAB_BYTES)
        weight, _slab = _slab[:num_bytes], _slab[size:]
    return weight


def new_lines(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialised memory that begins with a line of the cache, `READABLE_BYTES` behind it."""
    memory = np.empty(num_bytes + LINE_BYTES + READABLE_BYTES, np.uint8)
    return memory[-memory.ctypes.data % LINE_BYTES :][:num_bytes]


def new_rows(num_rows: int, size: int) -> npt.NDArray[np.float32]:
    """An uninitialised float32 array [num_rows, size] in memory of `new_lines`."""
    return new_lines(num_rows * size * 4).view(np.float32).reshape(num_rows, size)


@njit(**FAST)
def empty_lines(num_bytes):  # type: ignore[no-untyped-def]
    """Memory as `new_lines` makes it, within a kernel."""
    memory = np.empty(num_bytes + LINE_BYTES + READABLE_BYTES, np.uint8)
    start = -memory.ctypes.data % LINE_BYTES
    return memory[start : start + num_bytes]


def flat_view(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The memory of a contiguous tensor as a flat array the kernels can load: 16-bit floats as their bits. No copy."""
    bits = _BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).numpy().reshape(-1)


def new_output(num_rows: int, size: int) -> tuple[torch.Tensor, npt.NDArray[np.float32]]:
    """An uninitialised float32 tensor [num_rows, size] and its memory as a flat array: that of `new_rows`.

    In a program it grows with the rows of a step (`program_cpu.Recording`); for what does not, there is `new_fixed`.
    NumPy asks for huge pages where it is large.
    """
    array = new_rows(num_rows, size) if _observer is None else _observer.new_array(num_rows, size)
    return torch.from_numpy(array), array.reshape(-1)


def new_fixed(size: int) -> torch.Tensor:
    """An uninitialised float32 tensor [size] for numbers that are as many whatever the number of rows."""
    array = np.empty((1, size), np.float32) if _observer is None else _observer.new_array(None, size)
    return torch.from_numpy(array).view(-1)
