"""The one function that launches a Triton kernel.

On a GPU it launches. Under `TRITON_INTERPRET=1`, which Triton reads when a kernel is decorated, the same call runs the
kernel on CPU tensors. Under FakeTensorMode there is nothing to compute with: the call is recorded as the compiler would
see it, so that each launch of a whole model can be compiled ahead of time for cards that are not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from quant.kernels.interpreter import speed_up_interpreter

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in Python, as it decides itself by the same variable."""
if IS_INTERPRETED:
    speed_up_interpreter()

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ALIGNMENT = 16
"""Triton compiles a kernel of its own for addresses, and for integers, that are multiples of it."""
FP_FUSION = True
"""Whether compilers may fuse products and sums. Said at each launch, as Triton would take it from the environment."""


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """A launch as the compiler sees it: everything of it that decides the machine code."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    """The types of the runtime arguments by name: `*bf16`, `i32`, `fp32`."""
    aligned: frozenset[str]
    """Arguments that are known to be multiples of `ALIGNMENT`."""
    constants: tuple[tuple[str, Any], ...]
    """Compile-time arguments by name, an integer argument of 1 among them unless the kernel forbids it."""
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of `launch`, which may be made again: on what the same tensors hold then, with the same numbers."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def describe(self) -> Launch:
        return describe_launch(self.kernel, self.arguments, self.constants, self.num_warps, self.num_stages)

    def __call__(self) -> None:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": FP_FUSION}
        # Infinities are part of the arithmetic: NumPy, which interprets, would warn of them.
        with np.errstate(all="ignore") if IS_INTERPRETED else contextlib.nullcontext():
            self.kernel[self.grid](*self.arguments, **self.constants, **options)


_recording: list[Launch] | None = None
_observer: Callable[[Call], None] | None = None


@contextlib.contextmanager
def observed_launches(observer: Callable[[Call], None]) -> Iterator[None]:
    """Hand the launches of real tensors to `observer` within this block; it makes them."""
    global _observer
    assert _observer is None, "observers do not nest"
    _observer = observer
    try:
        yield
    finally:
        _observer = None


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """The launches on fake tensors within this block, in order."""
    global _recording
    assert _recording is None, "recordings do not nest"
    _recording = []
    try:
        yield _recording
    finally:
        _recording = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run `kernel` over `grid` with the runtime `arguments` in its order, and the constants by name.

    Raises ValueError for tensors on different devices, of a dtype that no kernel takes, or with holes.
    """
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    _check(kernel.fn.__name__, tensors)
    if 0 in grid:
        return
    call = Call(kernel, grid, arguments, constants, num_warps, num_stages)
    if isinstance(tensors[0], FakeTensor):
        if _recording is not None:
            _recording.append(call.describe())
    elif _observer is None:
        call()
    else:
        _observer(call)


def _check(name: str, tensors: list[torch.Tensor]) -> None:
    if len({tensor.device for tensor in tensors}) != 1:
        raise ValueError(f"{name}: tensors on {', '.join(sorted({str(tensor.device) for tensor in tensors}))}")
    for tensor in tensors:
        if tensor.dtype not in POINTERS:
            raise ValueError(f"{name}: no kernel takes {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: a tensor of shape {list(tensor.shape)} is not contiguous")


def describe_launch(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], num_warps: int, num_stages: int
) -> Launch:
    """What the compiler gets, specialized on integers as Triton does it at run time."""
    signature, aligned, fixed = [], [], list(constants.items())
    for parameter, argument in zip(kernel.params, arguments, strict=False):
        is_specialized = not parameter.do_not_specialize
        if isinstance(argument, torch.Tensor):
            signature.append((parameter.name, POINTERS[argument.dtype]))
            is_aligned = argument.storage_offset() * argument.element_size() % ALIGNMENT == 0
        elif isinstance(argument, float):
            signature.append((parameter.name, "fp32"))
            is_aligned = False
        elif is_specialized and argument == 1:
            fixed.append((parameter.name, 1))
            continue
        else:
            signature.append((parameter.name, "i32" if -(2**31) <= argument < 2**31 else "i64"))
            is_aligned = argument % ALIGNMENT == 0
        if is_specialized and is_aligned:
            aligned.append(parameter.name)
    return Launch(kernel, tuple(signature), frozenset(aligned), tuple(sorted(fixed)), num_warps, num_stages)
