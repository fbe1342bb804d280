"""Small sums between GPUs of one host through torch's symmetric memory: every GPU reads the others' buffers itself.

NCCL takes about as long for a few kilobytes as for a hundred; one kernel that reads over NVLink does not. It is used
only for dtypes for which a check at the start gets NCCL's sums on every rank: torch's kernel has no float16. Not run on
hardware: there was no GPU.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch

from parallel.state import Collectives

logger = logging.getLogger(__name__)

MAX_BYTES = 256 << 10
"""Size of the largest small sum. Larger ones are bound by bandwidth, so that reading every buffer is slower."""
ALIGNMENT = 4
"""A small sum has a multiple of so many bytes: torch's kernel takes no others."""
CHECKED_SIZES = (1, 3, 8, 896, 8192, MAX_BYTES // 4)
"""Numbers in a sum: a few are the host's own, others a model's."""
CHECKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = 1e-2
"""Relative error that is allowed: 16-bit numbers are added in another order."""

Sum = Callable[[torch.Tensor], torch.Tensor]
Connect = Callable[[], Sum]
"""Waits for the other ranks and shares with them what was allocated."""
T = TypeVar("T")


class SmallSums:
    """Implements `parallel.state.Collectives`: `fast` makes the small sums of some dtypes, `plain` all else."""

    def __init__(self, plain: Collectives, fast: Sum, dtypes: Collection[torch.dtype]) -> None:
        self._plain = plain
        self._fast = fast
        self._dtypes = dtypes
        self.name = f"{plain.name}, small sums through symmetric memory"

    @property
    def timeout_s(self) -> float:
        return self._plain.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._plain.timeout_s = seconds

    def give_up(self, cause: str) -> None:
        self._plain.give_up(cause)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if not _is_small(x) or x.dtype not in self._dtypes:
            return self._plain.all_reduce(x)
        return x.copy_(self._fast(x))

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return self._plain.all_gather(x, widths)

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        return self._plain.gather(x, widths)


def _is_small(x: torch.Tensor) -> bool:
    """Whether this is a small sum, on every rank alike."""
    return x.nbytes <= MAX_BYTES and x.nbytes % ALIGNMENT == 0


def with_small_sums(
    plain: Collectives, rank: int, device: torch.device, allocate: Callable[[], Connect]
) -> Collectives:
    """`plain` with the small sums of `allocate()()` in the dtypes in which these are right on every rank.

    A rank waits for the others only once all have their memory. Where there are no sums, it is `plain`, and the log
    says why.
    """
    reasons: list[str] = []
    connect = _attempt(plain, device, allocate, reasons)
    fast = None if connect is None else _attempt(plain, device, connect, reasons)
    dtypes: list[torch.dtype] = []
    if fast is not None:
        dtypes = _checked_dtypes(plain, rank, device, fast, reasons)
    if fast is None or not dtypes:
        cause = reasons[0] if reasons else "another rank has none, or gets other sums"
        logger.warning("Small sums don't go through symmetric memory: %s", cause)
        return plain
    return SmallSums(plain, fast, dtypes)


def _attempt(plain: Collectives, device: torch.device, make: Callable[[], T], reasons: list[str]) -> T | None:
    """`make()`, if no rank failed with it; if this one did, the reason is noted."""
    made = None
    try:
        made = make()
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # no peer access, another torch
        reasons.append(str(error).splitlines()[0])
    is_missing = torch.full((1,), float(made is None), device=device)
    return None if plain.all_reduce(is_missing).item() else made


def _checked_dtypes(
    plain: Collectives, rank: int, device: torch.device, fast: Sum, reasons: list[str]
) -> list[torch.dtype]:
    """The dtypes whose sums are those of `plain` on all ranks; what was wrong on this one is noted."""
    is_wrong = torch.zeros(len(CHECKED_DTYPES), device=device)
    for (index, dtype), size in itertools.product(enumerate(CHECKED_DTYPES), CHECKED_SIZES):
        x = torch.randn(size, generator=torch.Generator().manual_seed(size * 100 + rank)).to(device, dtype)
        if not _is_small(x):
            continue
        expected = plain.all_reduce(x.clone())  # on every rank, also after a difference
        if (difference := _difference(fast, x, expected, plain.name)) is not None:
            reasons.append(difference)
            is_wrong[index] = 1
    counts = plain.all_reduce(is_wrong).tolist()
    return [dtype for dtype, count in zip(CHECKED_DTYPES, counts, strict=True) if not count]


def _difference(fast: Sum, x: torch.Tensor, expected: torch.Tensor, name: str) -> str | None:
    """What is wrong with a small sum; None: nothing."""
    try:
        summed = fast(x)
    except RuntimeError as error:  # a dtype that it does not take, on any rank
        return f"no sums of {x.dtype}: {str(error).splitlines()[0]}"
    if not torch.allclose(summed, expected, rtol=TOLERANCE, atol=TOLERANCE):
        return f"sums of {x.numel()} {x.dtype} differ from those of {name}"
    return None


def allocate_one_shot_sum(group_name: str, device: torch.device) -> Connect:
    """torch's one-shot all-reduce, on a buffer made here.

    Raises RuntimeError if there can be no such buffer, and later if GPUs can't reach each other.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    buffer = symmetric_memory.empty(MAX_BYTES, dtype=torch.uint8, device=device)

    def add(x: torch.Tensor) -> torch.Tensor:
        operand = buffer[: x.nbytes].view(x.dtype).copy_(x.reshape(-1))
        summed: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce(operand, "sum", group_name)
        return summed.view_as(x)

    def connect() -> Sum:
        symmetric_memory.rendezvous(buffer, group_name)  # type: ignore[arg-type]
        return add

    return connect
