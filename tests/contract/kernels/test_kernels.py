"""Which kernel runs a matrix: the backend that the device names decides, the place of the weight does not."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

from parallel.embedding import VocabTable
from parallel.state import ParallelState
from quant.base import MatrixKernel, OnLoadMethod, PackedWeight
from quant.dense import DenseMethod
from quant.kernels import MATRICES, choose_kernel, rounding_instructions
from quant.kernels.packed_torch import PackedTorch
from quant.on_load import Int4Method, Int8Method
from quant.packing import widen
from quant.registry import load_entry
from tests.contract.kernels.test_packed_cpu import random_weight
from tests.contract.oracles import backends_here

TABLE = [
    (backend, layout, name)
    for backend in backends_here(MATRICES)
    for layout, names in MATRICES[backend].items()
    for name in names
]

STAND_IN = torch.device("meta")
"""A device that is not the CPU; its tensors have shapes and no numbers."""


@pytest.mark.parametrize(("backend", "layout", "name"), TABLE)
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_every_kernel_of_the_table_multiplies(backend: str, layout: str, name: str, num_rows: int) -> None:
    """The oracle is the product in float64."""
    packed = random_weight(4 if layout == "int4" else 8, 48, 192, 64)
    if layout == "dense":
        packed = PackedWeight("dense", widen(packed).bfloat16(), packed.bias)
    elif layout == "fp8":
        assert packed.zero_points is not None
        codes = packed.weight.float().to(torch.float8_e4m3fn).view(torch.uint8)
        zero_points = torch.zeros_like(packed.zero_points)
        packed = dataclasses.replace(packed, layout=layout, weight=codes, zero_points=zero_points)
    assert packed.layout == layout and packed.bias is not None
    kernel_class = load_entry(name)
    if reasons := kernel_class.why_not(packed):
        pytest.skip("; ".join(reasons))
    x = torch.randn(num_rows, 192, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ widen(packed).double().T + packed.bias.double()
    error = (kernel_class(packed)(x).double() - expected).norm() / expected.norm()
    assert error < (1e-6 if kernel_class.rounding is None else 2e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_backend_gets_its_own_kernels_for_tensors_in_host_memory(bits: int) -> None:
    packed = random_weight(bits, 24, 192, 64)
    assert isinstance(choose_kernel("torch", packed), PackedTorch)
    assert isinstance(choose_kernel("torch", packed, is_exact=False), PackedTorch)


@pytest.mark.parametrize("method", [Int8Method(), Int4Method()], ids="int8 int4".split())
def test_a_tied_table_is_packed_and_run_where_its_device_is(method: OnLoadMethod) -> None:
    """The table moves first and the head is packed of it: nothing of the head may stay behind."""
    heads: list[tuple[PackedWeight, MatrixKernel]] = []

    def choose(packed: PackedWeight) -> MatrixKernel:
        heads.append((packed, choose_kernel("torch", packed, is_exact=False)))
        return heads[-1][1]

    dense = DenseMethod(torch.bfloat16, computes_in_float32=False)
    table = VocabTable([slice(0, 24)], 64, dense, method, choose, ParallelState())
    table.load("weight", 0, torch.randn(24, 64))
    table.finish(STAND_IN)
    ((packed, kernel),) = heads
    tensors = [getattr(packed, field.name) for field in dataclasses.fields(packed)]
    assert {tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)} == {STAND_IN}
    assert isinstance(kernel, PackedTorch)
    assert table(torch.empty(2, 64, dtype=torch.bfloat16, device=STAND_IN)).device == STAND_IN


class Strict:
    """A stranger's kernel for few outputs."""

    rounding: ClassVar[str | None] = None
    row_counts = ()

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        num_outputs = packed.weight.shape[0]
        return [f"{num_outputs} outputs are more than 8", "and I am tired"] if num_outputs > 8 else []

    def __init__(self, packed: PackedWeight) -> None:
        self._weight = widen(packed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._weight.T


class Lenient(Strict):
    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        return []


def test_a_strangers_backend_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{__name__}:Strict", f"{__name__}:Lenient"]
    monkeypatch.setitem(MATRICES, "strange", {"int4": names, "dense": names[:1]})
    assert type(choose_kernel("strange", random_weight(4, 8, 64, 32))) is Strict
    assert type(choose_kernel("strange", random_weight(4, 9, 64, 32))) is Lenient
    with pytest.raises(ValueError, match="^9 outputs are more than 8; and I am tired$"):
        choose_kernel("strange", PackedWeight("dense", torch.zeros(9, 8)))
    assert isinstance(choose_kernel("strange", random_weight(8, 8, 64, 32)), PackedTorch)  # a layout that it lacks
    assert rounding_instructions("strange", "dense") is None
