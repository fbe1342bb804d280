"""The ground floor of all CPU kernels: Numba's settings, the memory of tensors as flat arrays, calls of kernels.

An observer sees the calls that Python makes within a block, so that a `program_cpu.Program` can make them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

FAST: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "cache": True}
"""Numba's settings for every kernel."""

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


class CallObserver(Protocol):
    """Sees the calls of kernels, and says where they write."""

    def take(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        """Take note of a call that was made."""

    def new_array(self, num_rows: int, size: int) -> npt.NDArray[np.float32]:
        """An uninitialised array [num_rows, size]."""


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
    """Call a compiled function. Every kernel that a layer of a model needs is called through this."""
    kernel(*arguments)
    if _observer is not None:
        _observer.take(kernel, arguments)


def flat_view(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The memory of a contiguous tensor as a flat array the kernels can load: 16-bit floats as their bits. No copy."""
    bits = _BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).numpy().reshape(-1)


def new_output(num_rows: int, size: int) -> tuple[torch.Tensor, npt.NDArray[np.float32]]:
    """An uninitialised float32 tensor [num_rows, size] and its memory as a flat array.

    NumPy makes it in half the time that torch takes, and asks for huge pages where it is large.
    """
    array = np.empty((num_rows, size), np.float32) if _observer is None else _observer.new_array(num_rows, size)
    return torch.from_numpy(array), array.reshape(-1)
