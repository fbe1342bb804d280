"""Adapters' changes in Triton against float64, within their tensors, and in a whole engine beside the base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_proof.adapter_cases import RandomAdapters
from engine.build import build_model, make_adapter_slots
from engine.checkpoint.files import read_model_config
from engine.device import Device, find_interpreted
from engine.graphs import GraphLimits, StepGraphs
from engine.link.config import EngineConfig
from engine.runner import ModelRunner
from engine.scheduling.adapters import AdapterCache
from engine.step_inputs import StepInputs
from quant.base import AdapterRows, LowRankShape
from quant.kernels import make_low_rank_kernel
from quant.kernels.low_rank_triton import (
    BLOCK_INPUTS,
    BLOCK_OUTPUTS,
    BLOCK_RANKS,
    BLOCK_ROWS,
    SPLIT_INPUTS,
    LowRankTriton,
)
from tests.contract.harness import make_sequence, random_ids, run_step
from tests.contract.test_adapter import ATTENTION
from tests.contract.test_expert_adapters import check_changes_of_experts
from tests.contract.test_lora import FIRST_MLP, write_adapter
from tests.interpreted.closeness import assert_close
from tests.interpreted.launches import launches_made_by, make_with_guards
from tests.interpreted.test_engine import PLAIN
from tests.tiny_model import write_tiny_qwen2, write_tiny_qwen3_moe

SIZES = [
    (BLOCK_INPUTS, [BLOCK_OUTPUTS]),
    (2 * SPLIT_INPUTS + 8, [BLOCK_OUTPUTS + 8, 24, 8]),
]
RANKS = [[16, 16, 16], [3, 0, 5], [0, 0, 1]]
"""The ranks of each slot, part after part: some fill no block, some change nothing."""
WIDE = [[BLOCK_RANKS[-1] + 3], [1], [BLOCK_RANKS[-1]]]
ROWS = [-1, 0, 0, 2, *[1] * BLOCK_ROWS, -1, 2]


def make(num_inputs: int, num_outputs: list[int], ranks: list[list[int]], dtype: torch.dtype) -> RandomAdapters:
    max_rank = max(map(max, ranks))
    shape = LowRankShape(num_inputs, num_outputs, len(ranks), max_rank, dtype, torch.device("cpu"))
    return RandomAdapters(shape, [row[: len(num_outputs)] for row in ranks], torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
def test_each_row_has_its_adapter(num_inputs: int, num_outputs: list[int], dtype: torch.dtype) -> None:
    adapters = make(num_inputs, num_outputs, RANKS, dtype)
    x, y = (torch.randn(len(ROWS), size).to(dtype) for size in (num_inputs, sum(num_outputs)))
    result = y.clone()
    kernel = adapters.kernel("triton", ROWS)
    kernel.add_to(result, x)
    assert_close(result, adapters.expected(y, x, ROWS), num_roundings=2)
    has_none = [index for index, slot in enumerate(ROWS) if slot < 0]
    assert torch.equal(result[has_none], y[has_none])


def test_ranks_of_several_blocks() -> None:
    adapters = make(BLOCK_INPUTS, [BLOCK_OUTPUTS], WIDE, torch.float32)
    x, y = torch.randn(len(ROWS), BLOCK_INPUTS), torch.randn(len(ROWS), BLOCK_OUTPUTS)
    result = y.clone()
    adapters.kernel("triton", ROWS).add_to(result, x)
    assert_close(result, adapters.expected(y, x, ROWS), num_roundings=2)


def test_a_row_has_the_same_bits_alone() -> None:
    num_inputs, num_outputs = SIZES[1]
    adapters = make(num_inputs, num_outputs, RANKS, torch.float16)
    x, y = (torch.randn(len(ROWS), size).half() for size in (num_inputs, sum(num_outputs)))
    together = y.clone()
    adapters.kernel("triton", ROWS).add_to(together, x)
    for row in (1, 3, len(ROWS) - 1):
        alone = y[row : row + 1].clone()
        adapters.kernel("triton", ROWS[row : row + 1]).add_to(alone, x[row : row + 1].clone())
        assert torch.equal(alone[0], together[row])


def test_nothing_is_written_or_read_outside_of_the_tensors() -> None:
    num_inputs, num_outputs = SIZES[1]
    adapters = make(num_inputs, num_outputs, RANKS, torch.float32)
    x, y = (torch.randn(len(ROWS), size) for size in (num_inputs, sum(num_outputs)))
    with launches_made_by(make_with_guards):
        result = y.clone()
        adapters.kernel("triton", ROWS).add_to(result, x)
    assert_close(result, adapters.expected(y, x, ROWS), num_roundings=2)


def test_each_row_has_the_change_of_its_adapter_and_its_expert() -> None:
    check_changes_of_experts(LowRankTriton)


def test_a_slot_that_held_a_larger_rank_has_nothing_left_of_it() -> None:
    former, latter = (make(BLOCK_INPUTS, [BLOCK_OUTPUTS], ranks, torch.float32) for ranks in ([[16]], [[3]]))
    step = AdapterRows()
    kernel = make_low_rank_kernel("triton", dataclasses.replace(latter.shape, max_rank=16), step)
    x, y = torch.randn(2, BLOCK_INPUTS), torch.randn(2, BLOCK_OUTPUTS)
    for adapters in (former, latter):
        kernel.put(0, adapters.updates[0])
    step.rows, step.slots = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    result = y.clone()
    kernel.add_to(result, x)
    assert_close(result, latter.expected(y, x, [0, 0]), num_roundings=2)


EXPERTS = [f"model.layers.0.mlp.experts.{expert}.{name}_proj" for expert in range(0, 8, 2) for name in ("up", "down")]
NAMES = ("all", None, "queries", "all")
SIZES_OF_PROMPTS = (5, 2, 3, 1)
DECODED = [[1, 2, 0, 3], [3], [2, 1, 0], [1]]
"""The sequences of the steps after the prompts': a graph, a smaller one, whose row of padding has a number in the step
before that it does not have, the larger one with padding, one without adapters."""


def logits_of(base: Path, folders: dict[str, Path], device: Device) -> list[torch.Tensor]:
    """The logits of the prompts, and of each step of `DECODED`, which are graphs where the device has any."""
    config = EngineConfig(model_path=str(base), lora_adapters=[(name, str(path)) for name, path in folders.items()])
    model = build_model(read_model_config(base), base, torch.float32, device)
    runner = ModelRunner(model, device, make_adapter_slots(config, model, torch.float32, device))
    runner.allocate(16, torch.float32, num_positions=64)
    runner.capture(GraphLimits(sizes=(2, 4), max_seq_len=64, num_kv_tokens=128))
    cache, sequences = AdapterCache(len(folders)), []
    for name in folders:
        cache.add(name)
    for number, name in enumerate(NAMES):
        sequences.append(make_sequence(random_ids(SIZES_OF_PROMPTS[number], number), [number + 1]))
        sequences[-1].adapter = None if name is None else cache.find(name)
    logits = [run_step(runner, sequences, [*SIZES_OF_PROMPTS])]
    for chosen in ([sequences[index] for index in indices] for indices in DECODED):
        for number, sequence in enumerate(chosen):
            sequence.token_ids.append(number + 7)
        logits.append(run_step(runner, chosen, [1] * len(chosen)))
    return logits


@pytest.mark.parametrize("has_experts", [False, True])
def test_an_engine_gives_the_logits_of_plain_torch(
    has_experts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters and the base in one batch: launched steps, and graphs with other rows than the last."""
    base = tmp_path / "base"
    write, mlp = (write_tiny_qwen3_moe, EXPERTS) if has_experts else (write_tiny_qwen2, FIRST_MLP)
    write(base, num_hidden_layers=1)
    attention = [name for name in ATTENTION if "layers.0" in name]
    folders = {
        name: write_adapter(tmp_path / name, base, modules, rank=5)
        for name, modules in {"all": [*attention, *mlp], "queries": attention[::2]}.items()
    }
    graphed: list[bool] = []
    run_graph = StepGraphs.run

    def noted(graphs: StepGraphs, inputs: StepInputs, *args: Any) -> torch.Tensor | None:
        logits = run_graph(graphs, inputs, *args)
        graphed.extend([bool(inputs.adapters)] * (logits is not None))
        return logits

    monkeypatch.setattr(StepGraphs, "run", noted)
    interpreted = find_interpreted(0)
    assert interpreted is not None
    for logits, expected in zip(*(logits_of(base, folders, each) for each in (interpreted, PLAIN)), strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert graphed == [True, True, True, False]
