"""A matrix product has the same bits however many threads share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant.base import PackedWeight
from quant.kernels.bfloat16_cpu import Bfloat16Cpu
from quant.kernels.dense_cpu import DenseCpu
from quant.kernels.integer_cpu import FOUND, IntegerCpu
from quant.kernels.packed_cpu import PackedCpu
from tests.contract.kernels.test_integer_cpu import WEIGHTS, random_rows

DENSE = PackedWeight("dense", random_rows(100, 384).to(torch.bfloat16))
CASES: dict[str, tuple[Any, PackedWeight]] = {
    "dense": (DenseCpu, DENSE),
    "widened int8": (PackedCpu, WEIGHTS["8 bits, groups of 64"]),
    "widened int4": (PackedCpu, WEIGHTS["4 bits, groups of 64"]),
}
if Bfloat16Cpu.rounding is not None:
    CASES["bfloat16"] = Bfloat16Cpu, DENSE
if FOUND is not None:
    CASES |= {name: (IntegerCpu, WEIGHTS[name]) for name in ("eetq", "eetq, odd", "4 bits, groups of 64")}


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    kernel_class, weight = CASES[name]
    kernel = kernel_class(weight)
    for num_rows in (1, 3, 31, 32, 77):
        x = random_rows(num_rows, 384)
        kernel._num_threads = 1
        expected = kernel(x)
        for num_threads in (2, 3, 7, 64):
            kernel._num_threads = num_threads
            assert torch.equal(kernel(x), expected), (num_rows, num_threads)
