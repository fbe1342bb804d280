"""Parts of the proof on a card with planted faults, each run in a process of its own by test_gpu_proof.py."""

from __future__ import annotations

import dataclasses
import os
import time

from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.settings import Settings


def good(settings: Settings, report: Report) -> None:
    report.fact(card="a card", capability=[9, 0])
    report.row("A table", rows=1, ms=0.5)
    report.check("one is one", [])


def kernels(settings: Settings, report: Report) -> None:
    """Cases with a fault each, and one without, in one process: torch is slow to load."""
    import torch

    from benchmarks.gpu_proof.checks import Case, Check, report_checks

    x = torch.randn(1000, generator=torch.Generator().manual_seed(settings.seed)).clamp(-2, 2)
    calls: list[float] = []

    def add_twice() -> torch.Tensor:
        """One number of many is off by a tenth of the largest."""
        spoilt = x.clone()
        spoilt[3] += 0.2
        return spoilt

    def differ() -> torch.Tensor:
        """Numbers are far within all limits, and others each time."""
        calls.append(1e-6)
        return x + sum(calls)

    def leave_out() -> torch.Tensor:
        out = torch.empty(1000)
        out[:999] = x[:999]
        return out

    def refuse() -> torch.Tensor:
        raise ValueError("no kernel takes this")

    faults = {"wrong": add_twice, "race": differ, "unwritten": leave_out, "raises": refuse, "right": x.clone}
    cases = {name: Case(run, x.double) for name, run in faults.items()}
    checks = [Check.of(name, lambda inputs, case=case: case) for name, case in cases.items()]
    report_checks(checks, dataclasses.replace(settings, device="cpu"), report, num_processes=1)


def hang(settings: Settings, report: Report) -> None:
    report.row("A table", rows=7)
    time.sleep(600)


def crash(settings: Settings, report: Report) -> None:
    report.check("before the crash", [])
    os.abort()


def nothing(settings: Settings, report: Report) -> None:
    """A part that has checked nothing has proved nothing."""


def absent(settings: Settings, report: Report) -> None:
    report.leave_out("the library is not installed")
