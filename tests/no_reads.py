"""Forbids whatever reads what a device has computed: operations that give a number, and methods of tensors that do.

On a GPU each such read waits for all that was launched. In tests tensors lie in host memory, where a read costs
nothing, or have no numbers at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.graph_capture import reads_device

READING_METHODS = "tolist item __bool__ __int__ __float__ __index__ __contains__".split()
READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.isfinite().all()),
    "branch": lambda x: 1 if x[0, 0] > 0 else 0,
    "index": lambda x: [0, 1][x[0, 0].long() * 0],
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "numpy": lambda x: x.numpy(),
    "host": lambda x: x.cpu(),
}
"""Ways to read, for tests that plant one."""


class ReadError(AssertionError):
    """Something has read device data."""


class NoReads(TorchDispatchMode):
    """Raises ReadError for operations that wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reads_device(func, args):
            raise ReadError(func.name())
        result = func(*args, **(kwargs or {}))
        if _leaves_device(args, result):
            raise ReadError(func.name())
        return result


def _leaves_device(args: Any, result: Any) -> bool:
    """Whether a tensor of a device has become one in host memory; true of nothing on a CPU."""
    sources = [arg for arg in args if isinstance(arg, torch.Tensor)]
    is_on_device = any(source.device.type != "cpu" for source in sources)
    return is_on_device and isinstance(result, torch.Tensor) and result.device.type == "cpu"


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Forbids methods of tensors from now on; more of them by name."""

    def forbid(*more: str) -> None:
        def refuse(name: str) -> Callable[..., Any]:
            def read(*args: Any, **kwargs: Any) -> Any:
                raise ReadError(name)

            return read

        for name in (*READING_METHODS, *more):
            monkeypatch.setattr(torch.Tensor, name, refuse(name))

    yield forbid
    monkeypatch.undo()
