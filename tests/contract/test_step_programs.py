"""Steps as programs: the same bits as call by call, whatever changes between the steps."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from engine.attention.cpu import BLOCK_SIZE
from engine.build import build_model, choose_quantization
from engine.checkpoint.files import read_model_config
from engine.layers.base import FEW_ROWS
from engine.programs import MAX_PROGRAMS, StepPrograms
from engine.runner import ModelRunner
from engine.scheduling.sequence import Sequence
from quant.kernels.program_cpu import Program
from tests.contract.harness import KERNELS, make_sequence, random_ids, run_step
from tests.tiny_model import write_tiny_qwen2
from tests.unit.engine.builders import make_batch

NUM_BLOCKS = 64


def make_runner(folder: Path, dtype: torch.dtype, method: str | None) -> tuple[ModelRunner, StepPrograms]:
    config = read_model_config(folder)
    flag, is_bfloat16 = (None, True) if method == "bfloat16" else (method, False)
    quantization = choose_quantization(config, folder, dtype, KERNELS, flag, None, is_bfloat16=is_bfloat16)
    model = build_model(config, folder, dtype, KERNELS, quantization)
    runner = ModelRunner(model, KERNELS)
    runner.allocate(NUM_BLOCKS, KERNELS.kv_dtype(dtype), num_positions=NUM_BLOCKS * BLOCK_SIZE)
    assert runner._programs is not None
    return runner, runner._programs


def steps_of(runner: ModelRunner) -> list[torch.Tensor]:
    """Logits of prompts, and of steps that decode one, two and three sequences with drafts of up to two tokens."""
    sequences = [
        make_sequence(random_ids(size, seed=size), list(range(first, first + 6)))
        for size, first in ((13, 0), (40, 6), (61, 12))
    ]
    logits = [run_step(runner, [sequence], [sequence.num_prompt_tokens]) for sequence in sequences]

    def decode(decoding: list[Sequence], draft: list[int]) -> None:
        for sequence in decoding:
            sequence.token_ids += random_ids(1, seed=len(sequence.token_ids))
        batch = make_batch(decoding, [1] * len(decoding), [draft] + [[]] * (len(decoding) - 1))
        logits.append(runner.execute(batch).logits.clone())
        for sequence in decoding:
            sequence.num_computed_tokens += 1

    for decoding, draft in ((sequences[:1], []), (sequences[1:], []), (sequences, [3, 5]), (sequences[2:], [7])):
        for _ in range(5):
            decode(decoding, draft)
    return logits


def test_recording_does_not_import_the_compiler_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is hundreds of modules, for which a start would wait most of a second."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    write_tiny_qwen2(tmp_path, dtype=torch.bfloat16)
    runner, programs = make_runner(tmp_path, torch.bfloat16, None)
    steps_of(runner)
    assert any(program is not None for program in programs._programs.values())


@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.float32, None), *((torch.bfloat16, method) for method in (None, "bfloat16", "eetq", "int4"))],
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


def test_a_program_takes_tokens_that_the_host_does_not_know(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, dtype=torch.bfloat16)
    runner, programs = make_runner(tmp_path, torch.float32, None)
    sequence = make_sequence(random_ids(13), list(range(6)))
    run_step(runner, [sequence], [13])
    sequence.token_ids.append(7)
    known = runner.inputs(make_batch([sequence], [1]))
    unknown = msgspec.structs.replace(known, input_ids=[0], unknown_places=[0], unknown_rows=[1])
    for _ in range(3):
        expected = runner.run(known).logits.clone()
        assert torch.equal(runner.run(unknown, torch.tensor([5, 7])).logits, expected)
    assert any(program is not None for program in programs._programs.values())


def test_new_memory_for_keys_and_values_is_what_later_steps_use(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, dtype=torch.bfloat16)
    runner, _ = make_runner(tmp_path, torch.float32, None)
    first = steps_of(runner)
    runner.allocate(NUM_BLOCKS, torch.float32, num_positions=NUM_BLOCKS * BLOCK_SIZE)
    for step, other in zip(steps_of(runner), first, strict=True):
        assert torch.equal(step, other)


def test_steps_that_torch_computes_a_part_of_are_computed_call_by_call(tmp_path: Path) -> None:
    """The reference operations, with the kernels' attention and matrices."""
    write_tiny_qwen2(tmp_path, dtype=torch.bfloat16)
    device = dataclasses.replace(KERNELS, ops="torch")
    model = build_model(read_model_config(tmp_path), tmp_path, torch.float32, device)
    runner = ModelRunner(model, device)
    runner.allocate(NUM_BLOCKS, torch.float32, num_positions=NUM_BLOCKS * BLOCK_SIZE)
    expected = steps_of(make_runner(tmp_path, torch.float32, None)[0])
    logits = steps_of(runner)
    assert runner._programs is not None and runner._programs.is_off
    torch.testing.assert_close(logits[-1], expected[-1], atol=2e-5, rtol=1e-4)


def test_work_with_an_operation_of_torch_keeps_its_result() -> None:
    programs = StepPrograms()
    x = torch.ones(1, 8)
    for count in range(2, 6):
        assert programs.run(1, (), [x], lambda: x.add_(1))[0, 0] == count
    assert programs.is_off


def test_the_variants_that_came_last_are_kept() -> None:
    programs = StepPrograms()
    x = torch.zeros(1, 8)
    for variant in range(2 * MAX_PROGRAMS):
        for _ in range(2):
            programs.run(1, variant, [x], lambda: x)
    assert list(programs._programs) == [(1, variant) for variant in range(MAX_PROGRAMS, 2 * MAX_PROGRAMS)]


def test_a_step_of_many_rows_is_never_recorded() -> None:
    programs = StepPrograms()
    x = torch.zeros(1, 8)
    for _ in range(3):
        programs.run(FEW_ROWS + 1, 0, [x], lambda: x)
    assert not programs._programs
