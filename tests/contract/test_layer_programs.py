"""Layers as programs: the same bits as call by call, whatever changes between the steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.attention.cpu import BLOCK_SIZE
from engine.build import build_model, choose_quantization
from engine.checkpoint.files import read_model_config
from engine.models.repeats import MAX_PROGRAMS, MAX_ROWS, LayerPrograms
from engine.runner import ModelRunner
from quant.kernels.arrays import flat_view
from quant.kernels.program_cpu import Program
from tests.contract.harness import KERNELS, make_sequence, random_ids, run_step
from tests.tiny_model import write_tiny_qwen2

NUM_BLOCKS = 64


def make_runner(folder: Path, dtype: torch.dtype, method: str | None) -> tuple[ModelRunner, LayerPrograms]:
    config = read_model_config(folder)
    quantization = choose_quantization(config, folder, dtype, KERNELS, method, None)
    model = build_model(config, folder, dtype, KERNELS, quantization)
    runner = ModelRunner(model, KERNELS)
    runner.allocate(NUM_BLOCKS, KERNELS.kv_dtype(dtype), num_positions=NUM_BLOCKS * BLOCK_SIZE)
    return runner, model.programs  # type: ignore[attr-defined]


def steps_of(runner: ModelRunner) -> list[torch.Tensor]:
    """Logits of steps that decode one, two and three sequences and begin blocks, of prompts, of drafts."""
    sequences = [
        make_sequence(random_ids(size, seed=size), list(range(first, first + 6)))
        for size, first in ((13, 0), (40, 6), (61, 12))
    ]
    logits = [run_step(runner, sequences[:1], [9])]
    logits += [run_step(runner, sequences[:1], [1]) for _ in range(4)]
    logits += [run_step(runner, sequences[1:], [30, 40])]
    logits += [run_step(runner, sequences[1:], [1, 1]) for _ in range(5)]
    logits += [run_step(runner, sequences[1:], [1, 2]) for _ in range(4)]
    logits += [run_step(runner, sequences[2:], [1]) for _ in range(4)]
    return logits


@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "eetq"), (torch.bfloat16, "int4")],
)
def test_a_program_gives_the_bits_of_its_calls(
    dtype: torch.dtype, method: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen2(tmp_path, dtype=torch.bfloat16)
    runs = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda program, *args: runs.append(program) or run(program, *args))
    plain, programs = make_runner(tmp_path, dtype, method)
    programs.is_off = True
    expected = steps_of(plain)
    assert not runs
    repeated, programs = make_runner(tmp_path, dtype, method)
    logits = steps_of(repeated)
    assert not programs.is_off
    assert len(runs) >= 8 and len(set(runs)) >= 3
    for step, other in zip(logits, expected, strict=True):
        assert torch.equal(step, other)


def test_new_memory_for_keys_and_values_is_what_later_steps_use(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, dtype=torch.bfloat16)
    runner, _ = make_runner(tmp_path, torch.float32, None)
    first = steps_of(runner)
    runner.allocate(NUM_BLOCKS, torch.float32, num_positions=NUM_BLOCKS * BLOCK_SIZE)
    for step, other in zip(steps_of(runner), first, strict=True):
        assert torch.equal(step, other)


def test_layers_that_torch_computes_a_part_of_are_computed_call_by_call(tmp_path: Path) -> None:
    """The reference operations, with the kernels' attention and matrices."""
    write_tiny_qwen2(tmp_path, dtype=torch.bfloat16)
    device = dataclasses.replace(KERNELS, ops="torch")
    model = build_model(read_model_config(tmp_path), tmp_path, torch.float32, device)
    runner = ModelRunner(model, device)
    runner.allocate(NUM_BLOCKS, torch.float32, num_positions=NUM_BLOCKS * BLOCK_SIZE)
    expected = steps_of(make_runner(tmp_path, torch.float32, None)[0])
    logits = steps_of(runner)
    assert model.programs.is_off  # type: ignore[attr-defined]
    torch.testing.assert_close(logits[-1], expected[-1], atol=2e-5, rtol=1e-4)


def test_work_with_an_operation_of_torch_keeps_its_result() -> None:
    programs = LayerPrograms()
    x = torch.ones(1, 8)
    for count in range(2, 6):
        assert programs.run(1, (), [flat_view(x)], lambda: x.add_(1))[0, 0] == count
    assert programs.is_off


def test_large_steps_and_all_variants_but_the_last_ones_are_forgotten() -> None:
    programs = LayerPrograms()
    x = torch.zeros(1, 8)
    for variant in range(2 * MAX_PROGRAMS):
        for _ in range(2):
            programs.run(1, variant, [flat_view(x)], lambda: x)
    programs.run(MAX_ROWS + 1, 0, [flat_view(x)], lambda: x)
    assert len(programs._programs) == MAX_PROGRAMS
