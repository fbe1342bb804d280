"""Graphs of device work: the protocol of what captures them, and the stand-in of devices that have none.

A graph does again what was done when it was captured: the same kernels, on the same addresses, with the same numbers.
What a step changes must lie in memory that the graph reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant.kernels.launch import Call, observed_launches

Work = Callable[[], torch.Tensor]
"""Work for the device without arguments, and the tensor with its result."""

READS = "_local_scalar_dense _unique2 equal is_nonzero item masked_select nonzero unique_consecutive".split()
"""Operations that wait for the device, because their result is a number or has a size that it decides."""


class CaptureError(RuntimeError):
    """The work reads what the device computes, so that no graph can have it."""


class Recorder(Protocol):
    """Captures graphs, of which one at a time may be replayed."""

    def capture(self, work: Work) -> Work:
        """Run `work` and return its replay, which gives the result in the same tensor each time.

        Raises RuntimeError for work that can't be captured. Nothing more can be captured or computed after that: the
        device may be left in the middle of it.
        """


class Tape:
    """Implements `Recorder` without a GPU: operations of torch and launches of Triton are written down and done again.

    Everything that Python decided stays as it was: numbers, shapes, addresses. A tensor that `work` got without numbers
    in it holds NaN at every replay, as other graphs have written there meanwhile.
    """

    def capture(self, work: Work) -> Work:
        notes = _Notes()
        with notes, observed_launches(notes.take_launch):
            result = work()

        def replay() -> torch.Tensor:
            for note in notes.steps:
                note()
            return result

        return replay


class _Notes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What has been done, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Callable[[], None]] = []
        self._is_launching = False

    def take_launch(self, call: Call) -> None:
        self._is_launching = True  # the operations with which Triton interprets are not the program's
        call()
        self._is_launching = False
        self.steps.append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_launching:
            return func(*args, **kwargs)
        if reads_device(func, args):
            raise CaptureError(f"{func.name()} reads what the device has computed")
        result = func(*args, **kwargs)
        self.steps.append(functools.partial(_do_again, func, args, kwargs, result))
        return result


def reads_device(func: Any, args: Any) -> bool:
    """Whether an operation waits for the device; a mask as an index does, as it decides on the result's size."""
    name = _operation(func)
    indices = [index for arg in args if isinstance(arg, list | tuple) for index in arg]
    has_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
    return name in READS or (name.startswith("index") and has_mask)


def _do_again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Do an operation again, into the tensors that it made the first time."""
    name = _operation(func)
    for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
        if name in ("empty", "empty_like", "empty_strided", "new_empty"):
            if old.is_floating_point():
                old.fill_(torch.nan)
        elif old.data_ptr() != new.data_ptr():  # equal: a view, or changed in place
            old.copy_(new)


def _operation(func: Any) -> str:
    """An operation's name without its variant."""
    name: str = func.name()
    return name.removeprefix("aten::").split(".")[0]


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    for value in result if isinstance(result, list | tuple) else [result]:
        if isinstance(value, torch.Tensor):
            yield value
