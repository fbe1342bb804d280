"""Matrices of experts that are cut for ranks: how they find out that all inputs are gathered."""

from __future__ import annotations

import torch

from parallel.experts import RowParallelExperts
from parallel.linear import RowParallelLinear
from parallel.state import ParallelState
from quant.gptq import GptqMethod
from tests.unit.quant.test_scaled import Kept


class Counted(RowParallelLinear):
    num_gathers = 0

    def gather(self) -> None:
        self.num_gathers += 1
        super().gather()


def test_one_expert_out_of_order_makes_each_of_them_gather_once() -> None:
    parallel, method = ParallelState(0, 2), GptqMethod(4, 32, has_stored_minus_one=True)
    shards = [slice(0, 64), slice(64, 128)]
    experts = [Counted(shards, 64, method=method, kernels=Kept(), parallel=parallel) for _ in range(8)]
    layer = RowParallelExperts(experts, parallel, lambda matrices: None)  # type: ignore[arg-type, return-value]
    in_order = torch.arange(128, dtype=torch.int32) // 32
    for part in range(8):
        layer.load("g_idx", part, in_order if part == 0 else in_order.flip(0))
    assert [expert.num_gathers for expert in experts] == [1] * 8
    assert all(expert.output_widths == [32, 32] for expert in experts)
