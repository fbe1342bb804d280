"""Copies between host and device that hold up neither: through pinned memory, in the order of the device's work.

torch hands pinned memory out again only once the copies from and to it are done, so nothing is overwritten too early.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@functools.cache
def is_pinning(device: torch.device) -> bool:
    """Whether copies from and to `device` go through pinned memory: it has memory of its own, and torch a driver."""
    return device.type != "cpu" and torch.accelerator.is_available()


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The numbers of an array on `device`: one copy, which begins after the work that was launched before."""
    on_host = torch.from_numpy(array)
    if is_pinning(device):
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


class HostCopy:
    """A tensor's numbers on their way to the host: the copy begins when this is made, and is waited for when read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._on_host, self._copied = tensor, None
        if tensor.device.type == "cpu":
            return
        is_pinned = is_pinning(tensor.device)
        self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
        self._on_host.copy_(tensor, non_blocking=is_pinned)
        if is_pinned:
            self._copied = torch.Event(tensor.device)
            self._copied.record()

    def read(self) -> npt.NDArray[Any]:
        """The numbers, once they are there; nothing that was launched since is waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._on_host.numpy()
