"""All kernels against their references on this card, and the tiny model's ids against plain torch on the CPU."""

from __future__ import annotations

import dataclasses
import sys

from benchmarks.gpu_proof.adapter_cases import adapter_checks
from benchmarks.gpu_proof.attention_cases import attention_checks
from benchmarks.gpu_proof.checks import Check, report_checks
from benchmarks.gpu_proof.engine_checks import engine_checks
from benchmarks.gpu_proof.matrix_cases import matrix_checks
from benchmarks.gpu_proof.ops_cases import ops_checks
from benchmarks.gpu_proof.processes import num_cores
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.sampling_checks import sampling_checks
from benchmarks.gpu_proof.settings import Settings

MAX_PROCESSES = 8
"""Processes that share the card: each kernel is compiled when it is first launched, which takes most of the time."""
CPU_LIBRARIES = "numba llvmlite tokenizers huggingface_hub transformers".split()


def run(settings: Settings, report: Report) -> None:
    print(f"seed {settings.seed}", flush=True)
    checks = engine_checks(is_toy=settings.is_toy) + kernel_checks(is_toy=settings.is_toy)
    report_checks(checks, settings, report, num_processes=min(MAX_PROCESSES, num_cores()))
    imported = [name for name in CPU_LIBRARIES if name in sys.modules]
    report.check("nothing of the CPU path is imported", [f"{name} is" for name in imported])


def run_few(settings: Settings, report: Report) -> None:
    """The kernels with small inputs: a sanitizer takes a hundred times as long."""
    small = dataclasses.replace(settings, is_toy=True)
    report_checks(kernel_checks(is_toy=True), small, report, num_processes=1)


def kernel_checks(*, is_toy: bool) -> list[Check]:
    return [
        *ops_checks(is_toy=is_toy),
        *attention_checks(is_toy=is_toy),
        *sampling_checks(is_toy=is_toy),
        *matrix_checks(is_toy=is_toy),
        *adapter_checks(is_toy=is_toy),
    ]
