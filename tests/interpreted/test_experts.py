"""Grouped products in Triton against the matrices one by one, in plain torch; models with experts as a whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.device import find_interpreted
from engine.layers.experts_torch import TorchExpertOps
from quant.grouped import MatrixByMatrix, choose_grouped
from quant.kernels.dense_torch import DenseTorch
from quant.kernels.grouped_triton import BLOCK_INPUTS, BLOCK_OUTPUTS, GroupedTriton
from quant.kernels.packed_torch import PackedTorch
from tests.contract.harness import make_core, make_requests, make_runner, random_ids, run_requests
from tests.interpreted.closeness import assert_close
from tests.interpreted.test_engine import PLAIN
from tests.random_weights import random_packed
from tests.tiny_model import write_tiny_qwen2_moe

NUM_MATRICES = 4
SIZES = [(BLOCK_OUTPUTS, BLOCK_INPUTS), (BLOCK_OUTPUTS + 8, BLOCK_INPUTS + 32)]


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SIZES)
@pytest.mark.parametrize(
    ("layout", "has_order"), [("dense", False), ("int8", False), ("int4", False), ("int4", True), ("fp8", False)]
)
def test_each_row_meets_its_matrix(layout: str, has_order: bool, num_outputs: int, num_inputs: int) -> None:
    torch.manual_seed(0)
    matrices = [random_packed(layout, num_outputs, num_inputs, has_order=has_order) for _ in range(NUM_MATRICES)]
    routing = TorchExpertOps().route(torch.randn(5, NUM_MATRICES), NUM_MATRICES, 2, is_normalized=True)
    x = torch.randn(10, num_inputs)
    kernel = DenseTorch if layout == "dense" else PackedTorch
    reference = MatrixByMatrix([kernel(packed) for packed in matrices])
    expected = reference(x.double(), routing.groups)
    product = GroupedTriton(matrices)
    assert_close(product(x, routing.groups), expected, num_roundings=4)
    assert product(x[:0], routing.groups).shape == (0, num_outputs)


def test_matrices_with_offsets_are_left_to_those_that_know_them() -> None:
    matrices = [random_packed("int4", BLOCK_OUTPUTS, BLOCK_INPUTS) for _ in range(2)]
    offsets = [
        dataclasses.replace(each, zero_points=torch.rand(BLOCK_OUTPUTS, BLOCK_INPUTS // 32)) for each in matrices
    ]
    assert GroupedTriton.why_not(matrices) == []
    assert GroupedTriton.why_not(offsets) == ["weights have offsets in place of zero points"]
    chosen = choose_grouped("triton", offsets, PackedTorch, is_exact=True)
    assert isinstance(chosen, MatrixByMatrix)


@pytest.mark.long
def test_ids_are_those_of_plain_torch(tmp_path: Path) -> None:
    write_tiny_qwen2_moe(tmp_path)
    requests = make_requests([random_ids(1, 1), random_ids(9, 20)], max_new_tokens=2)
    device = find_interpreted(0)
    assert device is not None
    ids = [
        run_requests(make_core(tmp_path, runner=make_runner(tmp_path, device=each)), requests).token_ids
        for each in (device, PLAIN)
    ]
    assert ids[0] == ids[1]
