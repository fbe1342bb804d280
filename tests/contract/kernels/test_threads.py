"""A matrix product has the same bits however many threads share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant.base import PackedWeight
from quant.kernels.amx import HAS_AMX
from quant.kernels.bfloat16_amx_cpu import Bfloat16Amx
from quant.kernels.bfloat16_cpu import Bfloat16Cpu
from quant.kernels.dense_cpu import DenseCpu
from quant.kernels.integer_cpu import FOUND, ROW_BLOCK, IntegerCpu
from quant.kernels.packed_cpu import PackedCpu
from quant.packing import widen
from tests.contract.kernels.test_integer_cpu import WEIGHTS, random_rows, symmetric_bytes
from tests.contract.kernels.test_packed_cpu import random_weight

DENSE = PackedWeight("dense", random_rows(100, 384).to(torch.bfloat16))
CASES: dict[str, tuple[Any, PackedWeight]] = {
    "dense": (DenseCpu, DENSE),
    "widened int8": (PackedCpu, WEIGHTS["8 bits, groups of 64"]),
    "widened int4": (PackedCpu, WEIGHTS["4 bits, groups of 64"]),
}
if Bfloat16Cpu.rounding is not None:
    CASES["bfloat16"] = Bfloat16Cpu, DENSE
if HAS_AMX:
    CASES["bfloat16 by AMX"] = Bfloat16Amx, DENSE
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


WIDE = PackedWeight("dense", random_rows(400, 4096).to(torch.bfloat16))
WIDE_CASES: dict[str, tuple[Any, PackedWeight]] = {
    "dense": (DenseCpu, WIDE),
    "widened int8": (PackedCpu, symmetric_bytes(400, 4096)),
    "widened int4": (PackedCpu, random_weight(4, 400, 4096, 64)),
}
if Bfloat16Cpu.rounding is not None:
    WIDE_CASES["bfloat16"] = Bfloat16Cpu, WIDE
if HAS_AMX:
    WIDE_CASES["bfloat16 by AMX"] = Bfloat16Amx, WIDE
if FOUND is not None:
    WIDE_CASES["eetq"] = IntegerCpu, symmetric_bytes(400, 4096)


@pytest.mark.parametrize("name", WIDE_CASES)
def test_bits_do_not_depend_on_who_computes_which_piece(name: str) -> None:
    """A thread has several pieces, with the most rows in two blocks."""
    kernel_class, weight = WIDE_CASES[name]
    kernel = kernel_class(weight)
    for num_rows in (1, 40, ROW_BLOCK + 7):
        x = random_rows(num_rows, 4096)
        kernel._num_threads = 1
        expected = kernel(x)
        torch.testing.assert_close(expected, x @ widen(weight).T + bias_of(weight), atol=1.0, rtol=0.05)
        for num_threads in (2, 7):
            kernel._num_threads = num_threads
            assert torch.equal(kernel(x), expected), (num_rows, num_threads)


def bias_of(weight: PackedWeight) -> torch.Tensor:
    return torch.zeros(()) if weight.bias is None else weight.bias
