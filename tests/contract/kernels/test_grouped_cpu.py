"""Grouped products on a CPU have the bits of the single matrices' kernels, whatever row has which matrix."""

from __future__ import annotations

import pytest
import torch

from engine.layers.experts_cpu import CpuExpertOps
from engine.layers.experts_torch import TorchExpertOps
from quant.base import PackedWeight
from quant.grouped import MatrixByMatrix, choose_grouped
from quant.kernels import choose_kernel
from tests.random_weights import random_packed

NUM_MATRICES, NUM_CHOSEN = 7, 3
CPU, TORCH = CpuExpertOps(), TorchExpertOps()


def check_bits(layout: str, *, is_exact: bool) -> None:
    """Outputs are no whole tiles; a matrix has one row, several, or none."""
    torch.manual_seed(0)
    matrices = [random_packed(layout, 43, 64) for _ in range(NUM_MATRICES)]

    def single(packed: PackedWeight) -> object:
        return choose_kernel("cpu", packed, is_exact=is_exact)

    grouped = choose_grouped("cpu", matrices, single, is_exact=is_exact)  # type: ignore[arg-type]
    assert not isinstance(grouped, MatrixByMatrix)
    reference = MatrixByMatrix([single(packed) for packed in matrices])  # type: ignore[misc]
    for num_rows in (1, 2, 9):
        logits = torch.randn(num_rows, NUM_MATRICES) * torch.tensor([3.0, 1, 1, 1, 1, 0.5, 0.1])
        groups = CPU.route(logits, NUM_MATRICES, NUM_CHOSEN, is_normalized=True).groups
        x = torch.randn(num_rows * NUM_CHOSEN, 64)
        assert torch.equal(grouped(x, groups), reference(x, groups))


@pytest.mark.parametrize("layout", ["dense", "int8"])
def test_products_in_float32(layout: str) -> None:
    check_bits(layout, is_exact=True)


@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_choices_by_kernels_and_by_torch(num_rows: int, is_normalized: bool) -> None:
    logits = torch.randn(num_rows, NUM_MATRICES + 1, generator=torch.Generator().manual_seed(num_rows))
    cpu, reference = (ops.route(logits, NUM_MATRICES, NUM_CHOSEN, is_normalized=is_normalized) for ops in (CPU, TORCH))
    assert torch.equal(cpu.places, reference.places)
    assert torch.equal(cpu.groups.sources, reference.groups.sources)
    for name in ("starts", "matrices"):
        assert torch.equal(getattr(cpu.groups, name), getattr(reference.groups, name)), name
    num_active = 1 + int(cpu.groups.active[0])
    assert torch.equal(cpu.groups.active[:num_active], reference.groups.active[:num_active])
    torch.testing.assert_close(cpu.weights, reference.weights, atol=1e-6, rtol=1e-6)
    x, outputs, shared = torch.randn(num_rows, 16), torch.randn(num_rows * NUM_CHOSEN, 16), torch.randn(num_rows, 16)
    torch.testing.assert_close(CPU.mix(outputs, cpu), TORCH.mix(outputs, reference), atol=1e-5, rtol=1e-5)
    added = [ops.add_gated(x.clone(), shared, logits, NUM_MATRICES) for ops in (CPU, TORCH)]
    torch.testing.assert_close(*added, atol=1e-6, rtol=1e-6)


def test_a_token_without_numbers_spoils_its_own_row_alone() -> None:
    logits, outputs = torch.randn(4, NUM_MATRICES), torch.randn(4 * NUM_CHOSEN, 16)
    logits[1] = torch.nan
    routing = CPU.route(logits, NUM_MATRICES, NUM_CHOSEN, is_normalized=False)
    assert CPU.mix(outputs, routing).isnan().all(dim=1).tolist() == [False, True, False, False]


def test_the_first_of_equal_experts_are_chosen() -> None:
    routing = CPU.route(torch.zeros(2, NUM_MATRICES), NUM_MATRICES, NUM_CHOSEN, is_normalized=True)
    assert routing.groups.matrices.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(routing.weights, torch.full((2, 3), 1 / 3))
