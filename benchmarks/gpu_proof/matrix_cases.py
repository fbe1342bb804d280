"""Cases of the matrix kernels: every form, few rows and many, odd sizes, float32 logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from benchmarks.gpu_proof.checks import Case
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.weights import FORMS, exact_product, random_weight
from quant.kernels import choose_kernel

ROWS, TOY_ROWS = (1, 3, 16, 17, 33, 64, 65, 200), (1, 17, 65)
HALF_ROWS, TOY_HALF_ROWS = (2, 64), (2,)


def matrix_cases(inputs: Inputs) -> Iterator[Case]:
    outputs, num_inputs = (80, 256) if inputs.is_toy else (3584, 3584)
    for form_name in FORMS:
        for rows in TOY_ROWS if inputs.is_toy else ROWS:
            yield _case(inputs, form_name, outputs, num_inputs, rows, torch.bfloat16, has_bias=rows % 2 > 0)
        for rows in TOY_HALF_ROWS if inputs.is_toy else HALF_ROWS:
            yield _case(inputs, form_name, outputs + 3, num_inputs, rows, torch.float16)
    for form_name in ("dense", "int8"):
        for rows in (1, 65):
            yield _case(inputs, form_name, outputs, num_inputs, rows, torch.bfloat16, gives_float32=True)
    if not inputs.is_toy:  # a float32 matrix of Triton is as slow as it is rare
        for form_name in FORMS:
            yield _case(inputs, form_name, 520, 1024, 5, torch.float32)


def _case(
    inputs: Inputs,
    form_name: str,
    num_outputs: int,
    num_inputs: int,
    rows: int,
    dtype: torch.dtype,
    *,
    has_bias: bool = False,
    gives_float32: bool = False,
) -> Case:
    packed = random_weight(FORMS[form_name], num_outputs, num_inputs, dtype, inputs.generator, has_bias=has_bias)
    x = inputs.normal(rows, num_inputs, dtype=dtype)
    if gives_float32:
        packed = dataclasses.replace(packed, out_dtype=torch.float32)
    kernel = choose_kernel("triton", packed)
    result = "to float32" if gives_float32 else str(dtype).removeprefix("torch.")
    name = f"{rows} rows x {form_name} [{num_outputs}, {num_inputs}] {result}"
    return Case(name, lambda: kernel(x), lambda: exact_product(packed, x), dtype)
