"""Cases of the matrix kernels: every form, few rows and many, odd sizes, float32 logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from benchmarks.gpu_proof.checks import Case, Check
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.weights import FORMS, exact_product, random_weight
from quant.kernels import choose_kernel

ROWS, TOY_ROWS = (1, 3, 16, 17, 33, 64, 65, 200), (1, 17, 65)
HALF_ROWS, TOY_HALF_ROWS = (2, 64), (2,)


def matrix_checks(*, is_toy: bool) -> Iterator[Check]:
    outputs, num_inputs = (80, 256) if is_toy else (3584, 3584)
    for form in FORMS:
        for rows in TOY_ROWS if is_toy else ROWS:
            yield _check(Shape(form, outputs, num_inputs, rows, torch.bfloat16, has_bias=rows % 2 > 0))
        for rows in TOY_HALF_ROWS if is_toy else HALF_ROWS:
            yield _check(Shape(form, outputs + 3, num_inputs, rows, torch.float16))
    for form in ("dense", "int8"):
        for rows in (1, 65):
            yield _check(Shape(form, outputs, num_inputs, rows, torch.bfloat16, gives_float32=True))
    if not is_toy:  # the engine's ids are those of float32 in the interpreter, too
        for form in FORMS:
            yield _check(Shape(form, 520, 1024, 5, torch.float32))


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A product."""

    form: str
    num_outputs: int
    num_inputs: int
    rows: int
    dtype: torch.dtype
    has_bias: bool = False
    gives_float32: bool = False


def _check(shape: Shape) -> Check:
    result = "to float32" if shape.gives_float32 else str(shape.dtype).removeprefix("torch.")
    name = f"{shape.rows} rows x {shape.form} [{shape.num_outputs}, {shape.num_inputs}] {result}"
    return Check.of(name, lambda inputs: _case(inputs, shape))


def _case(inputs: Inputs, shape: Shape) -> Case:
    form, sizes = FORMS[shape.form], (shape.num_outputs, shape.num_inputs)
    packed = random_weight(form, *sizes, shape.dtype, inputs.generator, has_bias=shape.has_bias)
    x = inputs.normal(shape.rows, shape.num_inputs, dtype=shape.dtype)
    if shape.gives_float32:
        packed = dataclasses.replace(packed, out_dtype=torch.float32)
    kernel = choose_kernel("triton", packed)
    return Case(lambda: kernel(x), lambda: exact_product(packed, x), shape.dtype)
