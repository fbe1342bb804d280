"""Stand-ins for the making of a launch: one tells what the compiler would see of it, one lays guards around tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from quant.kernels.launch import Call, Launch

GUARD = 1024
"""Numbers before and after a tensor that no kernel may write, and whose values must not show in any result."""
SENTINEL = 71
"""What stands there of integers; of other numbers NaN."""
OPTIONS = "version do_not_specialize do_not_specialize_on_alignment debug noinline repr launch_metadata".split()

MakeLaunch = Callable[[Call], None]


@contextlib.contextmanager
def launches_made_by(make: Callable[[Call, MakeLaunch], None]) -> Iterator[None]:
    """Every launch of this block goes to `make`, beside the function that makes it; those of graphs as well."""
    original = Call.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, "__call__", lambda call: make(call, original))
        yield


class Descriptions:
    """Makes every launch, and collects what decides its machine code."""

    def __init__(self) -> None:
        self.met: set[Launch] = set()

    def __call__(self, call: Call, make: MakeLaunch) -> None:
        launch = dataclasses.replace(call, kernel=_compilable(call.kernel)).describe()
        self.met.add(dataclasses.replace(launch, kernel=call.kernel))  # which has a hash, unlike its other form
        make(call)


@functools.cache
def _compilable(kernel: Any) -> Any:
    """The kernel as it is without the interpreter, which does not know the arguments that are not specialized."""
    return JITFunction(kernel.fn, **{key: value for key, value in kernel.kwargs.items() if key in OPTIONS})


class GuardError(AssertionError):
    """A kernel has written outside of its tensors."""


def make_with_guards(call: Call, make: MakeLaunch) -> None:
    """Make a launch on copies of its tensors that lie between guards. Raises GuardError."""
    copies: dict[tuple[int, torch.dtype, torch.Size], tuple[torch.Tensor, torch.Tensor]] = {}

    def guarded(argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        key = argument.data_ptr(), argument.dtype, argument.shape
        if key not in copies:
            fill = torch.nan if argument.is_floating_point() else SENTINEL
            arena = torch.full((argument.numel() + 2 * GUARD,), fill, dtype=argument.dtype)
            _inner(arena, argument).copy_(argument)
            copies[key] = argument, arena
        return _inner(copies[key][1], argument)

    make(dataclasses.replace(call, arguments=tuple(map(guarded, call.arguments))))
    for tensor, arena in copies.values():
        outside = torch.cat([arena[:GUARD], arena[-GUARD:]])
        is_kept = outside.isnan() if tensor.is_floating_point() else outside == SENTINEL
        if not is_kept.all():
            raise GuardError(f"{call.kernel.fn.__name__} writes past a tensor of shape {list(tensor.shape)}")
        tensor.copy_(_inner(arena, tensor))


def _inner(arena: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The place in the arena that has the tensor's shape."""
    return arena[GUARD : GUARD + tensor.numel()].view(tensor.shape)
