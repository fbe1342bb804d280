"""How a kernel is judged: against float64, with poisoned outputs, and twice."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.processes import in_processes
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.settings import Settings

NORM_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Dtype of the result -> the norm of the error over the norm of the reference, at most."""
MAX_LIMITS = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Dtype -> the error of any number over the largest number of the reference, at most: one wrong number is enough."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel with inputs, and what must come out."""

    run: Callable[[], torch.Tensor]
    """Computes it anew."""
    expected: Callable[[], torch.Tensor]
    """The reference in float64."""
    precision: torch.dtype | None = None
    """The dtype whose limits hold; None: the result's own. A float32 result of 16-bit sums has the sums' limits."""


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory is NaN within this block, so that a number that no kernel wrote is found."""
    _fill_memory(True)
    if not torch.empty(3).isnan().all():
        raise RuntimeError("this torch does not fill new memory")
    try:
        yield
    finally:
        _fill_memory(False)


def _fill_memory(is_on: bool) -> None:
    """Switch `torch.use_deterministic_algorithms`, which would also load torch's compiler, for seconds."""
    torch._C._set_deterministic_algorithms(is_on, warn_only=True)


def complaints_of(case: Case) -> list[str]:
    """What is wrong with the case's results: not written, not the same twice, not close to the reference."""
    with poisoned_memory():
        first, second = case.run().clone(), case.run().clone()
    expected = case.expected()
    if first.shape != expected.shape:
        return [f"has shape {list(first.shape)} instead of {list(expected.shape)}"]
    if not bool(first.isfinite().all()):
        return ["a number is not finite, or was not written"]
    complaints = [] if torch.equal(first, second) else ["two runs differ: a race"]
    precision = case.precision or first.dtype
    error, scale = first.double() - expected, expected.abs().max().clamp_min(1e-30)
    norm_error = float(error.norm() / expected.norm().clamp_min(1e-30))
    max_error = float(error.abs().max() / scale)
    if not norm_error <= NORM_LIMITS[precision]:
        complaints.append(f"the error's norm is {norm_error:.1e} of the reference's")
    if not max_error <= MAX_LIMITS[precision]:
        complaints.append(f"a number is off by {max_error:.1e} of the largest")
    return complaints


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that is checked with inputs of its own, in any process and order."""

    name: str
    complaints: Callable[[Inputs], list[str]]
    """What is wrong; empty if nothing is."""

    @classmethod
    def of(cls, name: str, make: Callable[[Inputs], Case]) -> Check:
        """The check of a kernel's case."""
        return cls(name, lambda inputs: complaints_of(make(inputs)))

    def judge(self, settings: Settings) -> list[str]:
        """The complaints; a check that raises has failed, and hides no other."""
        try:
            return self.complaints(Inputs.of(settings, self.name))
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]


def report_checks(checks: Sequence[Check], settings: Settings, report: Report, *, num_processes: int) -> None:
    """Judge all checks, each kernel's compilation beside the others': this process must not have used the card yet."""
    if num_processes == 1:
        for check in checks:
            report.check(check.name, check.judge(settings))
        return

    def judge(index: int) -> list[str]:
        return checks[index].judge(settings)

    for check, complaints in zip(checks, in_processes(judge, len(checks), num_processes), strict=True):
        report.check(check.name, complaints)
