"""The ground floor of all CPU kernels: Numba's settings, and the memory of tensors as the flat arrays they take."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FAST: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "cache": True}
"""Numba's settings for every kernel."""

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def flat_view(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The memory of a contiguous tensor as a flat array the kernels can load: 16-bit floats as their bits. No copy."""
    bits = _BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).numpy().reshape(-1)


def new_output(num_rows: int, size: int) -> tuple[torch.Tensor, npt.NDArray[np.float32]]:
    """An uninitialised float32 tensor [num_rows, size] and its memory as a flat array.

    NumPy makes it in half the time that torch takes, and asks for huge pages where it is large.
    """
    array = np.empty((num_rows, size), np.float32)
    return torch.from_numpy(array), array.reshape(-1)
