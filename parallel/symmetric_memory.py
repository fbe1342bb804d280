"""Small sums between GPUs of one host through torch's symmetric memory: every GPU reads the others' buffers itself.

NCCL takes about as long for a few kilobytes as for a hundred; one kernel that reads over NVLink does not. It is used
only if a check at the start gets NCCL's sums on every rank. Not run on hardware: there was no GPU.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

import torch

from parallel.state import Collectives

logger = logging.getLogger(__name__)

MAX_BYTES = 256 << 10
"""Size of the largest small sum. Larger ones are bound by bandwidth, so that reading every buffer is slower."""
CHECKED_SIZES = (8, 896, 8192, MAX_BYTES // 4)
CHECKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = 1e-2
"""Relative error that is allowed: 16-bit numbers are added in another order."""

Sum = Callable[[torch.Tensor], torch.Tensor]


class SmallSums:
    """Implements `parallel.state.Collectives`: `fast` makes the small sums, `plain` all else."""

    def __init__(self, plain: Collectives, fast: Sum) -> None:
        self._plain = plain
        self._fast = fast
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
        if x.nbytes > MAX_BYTES:
            return self._plain.all_reduce(x)
        return x.copy_(self._fast(x))

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return self._plain.all_gather(x, widths)

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        return self._plain.gather(x, widths)


def with_small_sums(plain: Collectives, rank: int, device: torch.device, make: Callable[[], Sum]) -> Collectives:
    """`plain` with the small sums of `make()`, if these are right on every rank; else `plain`, and the log says why."""
    problem = "another rank's sums are wrong"
    try:
        fast: Sum | None = make()
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # no peer access, another torch
        fast, problem = None, str(error).splitlines()[0]
    is_wrong = torch.full((1,), float(fast is None), device=device)
    for size, dtype in itertools.product(CHECKED_SIZES, CHECKED_DTYPES):
        generator = torch.Generator().manual_seed(size * 100 + rank)
        x = torch.randn(size, generator=generator).to(device, dtype)
        expected = plain.all_reduce(x.clone())  # on every rank, also after a difference
        if fast is not None and not torch.allclose(fast(x), expected, rtol=TOLERANCE, atol=TOLERANCE):
            if not is_wrong:
                problem = f"sums of {size} {dtype} differ from those of {plain.name}"
            is_wrong.fill_(1)
    if plain.all_reduce(is_wrong).item() > 0 or fast is None:
        logger.warning("Small sums don't go through symmetric memory: %s", problem)
        return plain
    return SmallSums(plain, fast)


def one_shot_sum(group_name: str, device: torch.device) -> Sum:
    """torch's one-shot all-reduce, on a buffer made here. Raises RuntimeError if GPUs can't reach each other."""
    import torch.distributed._symmetric_memory as symmetric_memory

    buffer = symmetric_memory.empty(MAX_BYTES, dtype=torch.uint8, device=device)
    symmetric_memory.rendezvous(buffer, group_name)  # type: ignore[arg-type]

    def add(x: torch.Tensor) -> torch.Tensor:
        operand = buffer[: x.nbytes].view(x.dtype).copy_(x.reshape(-1))
        summed: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce(operand, "sum", group_name)
        return summed.view_as(x)

    return add
