"""All kernels against their references on this card, and the tiny model's ids against plain torch on the CPU."""

from __future__ import annotations

import sys

from benchmarks.gpu_proof.attention_cases import attention_cases
from benchmarks.gpu_proof.checks import check_cases
from benchmarks.gpu_proof.engine_checks import check_engine
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.matrix_cases import matrix_cases
from benchmarks.gpu_proof.ops_cases import ops_cases
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.sampling_cases import check_sampling
from benchmarks.gpu_proof.settings import Settings

CPU_LIBRARIES = "numba llvmlite tokenizers huggingface_hub transformers".split()


def run(settings: Settings, report: Report) -> None:
    inputs = Inputs.of(settings)
    print(f"seed {settings.seed}", flush=True)
    check_engine(inputs, report)
    check_cases(ops_cases(inputs), report)
    check_cases(attention_cases(inputs), report)
    check_sampling(inputs, report)
    check_cases(matrix_cases(inputs), report)
    check_imports(report)


def check_imports(report: Report) -> None:
    """The GPU path does without the libraries of the CPU path, which a host with a card may lack."""
    imported = [name for name in CPU_LIBRARIES if name in sys.modules]
    report.check("nothing of the CPU path was imported", [f"{name} was" for name in imported])


def run_few(settings: Settings, report: Report) -> None:
    """The same kernels with small inputs: a sanitizer takes a hundred times as long."""
    inputs = Inputs.of(settings)
    small = Inputs(inputs.device, inputs.generator, is_toy=True)
    check_cases(ops_cases(small), report)
    check_cases(attention_cases(small), report)
    check_sampling(small, report)
    check_cases(matrix_cases(small), report)
