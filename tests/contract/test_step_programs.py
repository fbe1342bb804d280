"""Steps as programs: the same bits as call by call, whatever changes between the steps."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.attention.attend_cpu import PARALLEL_TOKENS
from engine.attention.cpu import BLOCK_SIZE, CpuAttention
from engine.build import build_model, choose_quantization
from engine.checkpoint.files import read_model_config
from engine.programs import MAX_PROGRAM_ROWS, MAX_RESULT_ROWS, StepPrograms
from engine.runner import ModelRunner
from engine.scheduling.sequence import Sequence
from quant.kernels.program_cpu import Program
from tests.contract.harness import KERNELS, make_sequence, random_ids, run_step
from tests.tiny_model import write_tiny_qwen2
from tests.unit.engine.builders import make_batch

NUM_BLOCKS = 128
SEQUENCE_BLOCKS = 24
"""Blocks of a sequence of `Steps`."""
FORMS = [(torch.float32, None), *((torch.bfloat16, method) for method in (None, "bfloat16", "eetq", "int4"))]
ADDRESS = 1 << 22
"""Words of an argument that are larger are addresses: no size in the tiny models is, and no heap begins below."""


def make_runner(folder: Path, dtype: torch.dtype, method: str | None) -> tuple[ModelRunner, StepPrograms]:
    config = read_model_config(folder)
    flag, is_bfloat16 = (None, True) if method == "bfloat16" else (method, False)
    quantization = choose_quantization(config, folder, dtype, KERNELS, flag, None, is_bfloat16=is_bfloat16)
    model = build_model(config, folder, dtype, KERNELS, quantization)
    runner = ModelRunner(model, KERNELS)
    runner.allocate(NUM_BLOCKS, KERNELS.kv_dtype(dtype), num_positions=NUM_BLOCKS * BLOCK_SIZE)
    assert runner._programs is not None
    return runner, runner._programs


class Steps:
    """Sequences that a runner computes as a test says: prompts in any chunks beside tokens that are drafted or not."""

    def __init__(self, runner: ModelRunner, num_prompt_tokens: list[int], num_blocks: int = SEQUENCE_BLOCKS) -> None:
        self.runner = runner
        self.sequences = [
            make_sequence(random_ids(size, seed=size), list(range(index * num_blocks, (index + 1) * num_blocks)))
            for index, size in enumerate(num_prompt_tokens)
        ]

    def run(self, counts: dict[int, int], draft: int = 0) -> torch.Tensor | None:
        """Logits of a step of so many tokens of each sequence, by its index, or of those that are left.

        Those that are complete then draft `draft` tokens, and get another one. None: no sequence was to go on.
        """
        chosen: list[tuple[Sequence, int]] = []
        for index, count in counts.items():
            sequence = self.sequences[index]
            count = min(count, len(sequence.token_ids) - sequence.num_computed_tokens)
            chosen += [(sequence, count)] if count else []
        if not chosen:
            return None
        sequences, sizes = [sequence for sequence, _ in chosen], [count for _, count in chosen]
        is_complete = [sequence.num_computed_tokens + count == len(sequence.token_ids) for sequence, count in chosen]
        drafts = [random_ids(draft, seed=3) if complete else [] for complete in is_complete]
        logits = self.runner.execute(make_batch(sequences, sizes, drafts)).logits.clone()
        for sequence, count, complete in zip(sequences, sizes, is_complete, strict=True):
            sequence.num_computed_tokens += count
            sequence.token_ids += random_ids(1, seed=len(sequence.token_ids)) if complete else []
        return logits


def steps_of(runner: ModelRunner) -> list[torch.Tensor]:
    """Logits of prompts whole and in chunks, of tokens beside them, of drafts, of steps that need no logits."""
    logits: list[torch.Tensor | None] = []
    steps = Steps(runner, [13, 40, 61, 150, 5])
    for index in (0, 1, 2):
        logits.append(steps.run({index: 500}))
    for indices, draft in (([0], 0), ([1, 2], 0), ([0, 1, 2], 2), ([2], 1)):
        for _ in range(3):
            logits.append(steps.run(dict.fromkeys(indices, 1), draft))
    logits.append(steps.run({3: 20}))
    logits.append(steps.run({0: 1, 3: 70, 1: 1}, 3))
    logits.append(steps.run({3: 7, 4: 3}))
    logits.append(steps.run({2: 1, 3: 500, 4: 500, 0: 1}, 1))
    logits.append(steps.run(dict.fromkeys(range(5), 1)))
    return [each for each in logits if each is not None]


def schedule_of(runner: ModelRunner, sizes: list[int], plan: list[tuple[list[int], int]]) -> list[torch.Tensor]:
    steps = Steps(runner, sizes)
    results = [steps.run(dict(enumerate(counts[: len(sizes)])), draft) for counts, draft in plan]
    return [result for result in results if result is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs")
    write_tiny_qwen2(path, dtype=torch.bfloat16)
    return path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Program]]:
    """The programs that run."""
    done: list[Program] = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda program, *args: done.append(program) or run(program, *args))
    yield done


def check_equal(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for index, (result, other) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, other), f"result {index}"


def test_recording_does_not_import_the_compiler_of_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is hundreds of modules, for which a start would wait most of a second."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    runner, programs = make_runner(folder, torch.bfloat16, None)
    steps_of(runner)
    assert programs.programs


@pytest.mark.parametrize(("dtype", "method"), FORMS)
def test_a_program_gives_the_bits_of_its_calls(
    dtype: torch.dtype, method: str | None, folder: Path, runs: list[Program]
) -> None:
    plain, programs = make_runner(folder, dtype, method)
    programs.is_off = True
    expected = steps_of(plain)
    assert not runs
    repeated, programs = make_runner(folder, dtype, method)
    logits = steps_of(repeated)
    assert not programs.refusals
    # Steps whose tokens all have logits, some of them, none: each kind is recorded once.
    assert len(programs.programs) == len(set(runs)) == 3
    assert len(runs) == len(logits) - 3
    check_equal(logits, expected)


ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, PARALLEL_TOKENS - 1, PARALLEL_TOKENS]
ROWS += [PARALLEL_TOKENS + 1, 100, 127, 128, 129, 170, 171, 255, 256, 257, 341, 342, MAX_PROGRAM_ROWS - 1]
ROWS += [MAX_PROGRAM_ROWS, MAX_PROGRAM_ROWS + 1]
"""Both sides of where kernels of the tiny models take several threads or another form: 32,768 numbers in rows of 64 to
512, 64 tokens, blocks of 3 to 64 rows."""


@pytest.mark.parametrize("hidden_size", [64, 256])
@pytest.mark.parametrize(("dtype", "method"), FORMS)
def test_prompts_of_any_size(
    dtype: torch.dtype, method: str | None, hidden_size: int, tmp_path: Path, runs: list[Program]
) -> None:
    write_tiny_qwen2(tmp_path, dtype=torch.bfloat16, hidden_size=hidden_size)
    results = []
    for is_off in (True, False):
        runner, programs = make_runner(tmp_path, dtype, method)
        programs.is_off = is_off
        logits = []
        for rows in ROWS:
            steps = Steps(runner, [rows, 3], 64)
            logits += [steps.run({0: 1000}), steps.run({0: 1, 1: 2}), steps.run({0: 1, 1: 1})]
        results.append([each for each in logits if each is not None])
    check_equal(*results)
    assert len(programs.programs) == 2 and not programs.refusals
    assert len(runs) == len(results[0]) - 2 - 1, "all but those that are recorded and the one that is too large"


@pytest.mark.parametrize(("dtype", "method"), FORMS)
def test_programs_keep_no_more_memory_than_planned(dtype: torch.dtype, method: str | None, folder: Path) -> None:
    runner, programs = make_runner(folder, dtype, method)
    steps_of(runner)
    kept = sum(array.nbytes for array in programs._arena._memory.values())
    planned = runner.program_bytes(runner._model.activations_per_token * torch.float32.itemsize, None)
    assert planned / 2 < kept <= 1.02 * planned  # a token has that many activations "roughly"


def test_as_many_sequences_as_there_is_memory_for(folder: Path, runs: list[Program]) -> None:
    """All rows have logits; the first such step, of one row, is recorded."""
    results = []
    for is_off in (True, False):
        runner, programs = make_runner(folder, torch.bfloat16, None)
        programs.is_off = is_off
        logits = []
        for num_sequences in (1, MAX_RESULT_ROWS - 1, MAX_RESULT_ROWS, MAX_RESULT_ROWS + 1, 2):
            steps = Steps(runner, [1] * num_sequences, 1)
            logits += [steps.run(dict.fromkeys(range(num_sequences), 1)) for _ in range(2)]
        results.append([each for each in logits if each is not None])
    check_equal(*results)
    assert len(programs.programs) == 1
    assert len(runs) == len(results[0]) - 1 - 2, "all but the one that is recorded and the two that are too large"


def test_as_many_tokens_with_logits_as_one_likes(folder: Path) -> None:
    """From none to all of 18 rows, which are in the middle of prompts or at their ends."""
    results = []
    for is_off in (True, False):
        runner, programs = make_runner(folder, torch.bfloat16, "eetq")
        programs.is_off = is_off
        logits = []
        for num_ends in [*range(6), 3, 0, 6, 1]:
            steps = Steps(runner, [3] * num_ends + [9] * (6 - num_ends), 4)
            logits.append(steps.run(dict.fromkeys(range(6), 3)))
            logits.append(steps.run(dict.fromkeys(range(num_ends), 1), 2))
        results.append([each for each in logits if each is not None])
    check_equal(*results)
    assert {len(each) for each in results[0]} == {0, 1, 2, 3, 4, 5, 6, 9, 12, 15, 18}
    assert len(programs.programs) == 3


@pytest.mark.parametrize("size", [3, 700])
def test_parts_of_long_sequences(size: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys are shared by threads in parts, or not."""
    monkeypatch.setattr(CpuAttention, "_is_balanced", lambda *_: False)
    monkeypatch.setattr("engine.attention.cpu.get_num_threads", lambda: 2)
    results = []
    for is_off in (True, False):
        runner, programs = make_runner(folder, torch.bfloat16, None)
        programs.is_off = is_off
        steps = Steps(runner, [1060, size], 68)
        plan = [{0: 500}, {0: 500}, {1: 2}, {0: 500}, {0: 1}, {0: 1, 1: 1}, {1: 400}, {0: 1, 1: 400}, {0: 1, 1: 1}]
        results.append([each for counts in plan for each in [steps.run(counts)] if each is not None])
    check_equal(*results)
    kinds = {variant[0][0] for variant in programs.programs}  # type: ignore[index]
    assert kinds == {(False,), (True,)}


@pytest.mark.parametrize(("dtype", "method"), FORMS)
def test_a_program_is_the_same_whatever_step_it_was_recorded_of(
    dtype: torch.dtype, method: str | None, folder: Path
) -> None:
    """All numbers of all arguments, addresses aside, are those of a recording of the very step."""
    runner, programs = make_runner(folder, dtype, method)

    def compute(sizes: list[int]) -> None:
        steps = Steps(runner, sizes, 16)
        steps.run(dict.fromkeys(range(len(sizes)), 13))
        steps.run(dict.fromkeys(range(len(sizes)), 1))

    def numbers() -> dict[Any, np.ndarray[Any, Any]]:
        words = {variant: program._words for variant, program in programs.programs.items()}
        return {variant: np.where(abs(each) < ADDRESS, each, 0) for variant, each in words.items()}

    cases = [[13], [5, 13], [9, 13, 200], [13, 11, 13, 1, 2, 40], [2] * 5]
    compute(cases[0])
    for case in [*cases, *cases]:
        compute(case)
        patched = numbers()
        programs.clear()
        compute(case)
        recorded = numbers()
        assert recorded
        for variant, words in recorded.items():
            assert np.array_equal(words, patched[variant])


@pytest.fixture(scope="module", params=[None, "int4"])
def runners(request: pytest.FixtureRequest, folder: Path) -> tuple[ModelRunner, ModelRunner]:
    plain, programs = make_runner(folder, torch.bfloat16, request.param)
    programs.is_off = True
    return plain, make_runner(folder, torch.bfloat16, request.param)[0]


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    plan=st.lists(
        st.tuples(st.lists(st.sampled_from([0, 1, 1, 2, 16, 33, 90, 300]), min_size=5, max_size=5), st.integers(0, 3)),
        min_size=1,
        max_size=8,
    ),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schedule(
    runners: tuple[ModelRunner, ModelRunner], sizes: list[int], plan: list[tuple[list[int], int]]
) -> None:
    plain, repeated = runners
    check_equal(schedule_of(repeated, sizes, plan), schedule_of(plain, sizes, plan))
    programs = repeated._programs
    assert programs is not None
    assert not programs.refusals and len(programs.programs) <= 6


def test_a_program_takes_tokens_that_the_host_does_not_know(folder: Path) -> None:
    runner, programs = make_runner(folder, torch.float32, None)
    sequence = make_sequence(random_ids(13), list(range(6)))
    run_step(runner, [sequence], [13])
    sequence.token_ids.append(7)
    known = runner.inputs(make_batch([sequence], [1]))
    unknown = msgspec.structs.replace(known, input_ids=[0], unknown_places=[0], unknown_rows=[1])
    for _ in range(3):
        expected = runner.run(known).logits.clone()
        assert torch.equal(runner.run(unknown, torch.tensor([5, 7])).logits, expected)
    assert programs.programs


def test_new_memory_for_keys_and_values_is_what_later_steps_use(folder: Path) -> None:
    runner, _ = make_runner(folder, torch.float32, None)
    first = steps_of(runner)
    runner.allocate(NUM_BLOCKS, torch.float32, num_positions=NUM_BLOCKS * BLOCK_SIZE)
    check_equal(steps_of(runner), first)


def test_steps_that_copy_blocks_or_score_tokens_are_computed_call_by_call(folder: Path, runs: list[Program]) -> None:
    runner, programs = make_runner(folder, torch.float32, None)
    sequence = make_sequence(random_ids(13), list(range(6)))
    inputs = runner.inputs(make_batch([sequence], [13]))
    copying = msgspec.structs.replace(inputs, block_copies=[(7, 8)])
    scoring = msgspec.structs.replace(inputs, scored_indices=[0, 5], scored_token_ids=[1, 2])
    for _ in range(2):
        logits = [runner.run(each).logits.clone() for each in (copying, scoring)]
    assert not programs.programs and not runs
    check_equal(logits, [runner.run(inputs).logits] * 2)


def test_steps_that_torch_computes_a_part_of_are_computed_call_by_call(folder: Path) -> None:
    """The reference operations, with the kernels' attention and matrices."""
    device = dataclasses.replace(KERNELS, ops="torch")
    model = build_model(read_model_config(folder), folder, torch.float32, device)
    runner = ModelRunner(model, device)
    runner.allocate(NUM_BLOCKS, torch.float32, num_positions=NUM_BLOCKS * BLOCK_SIZE)
    expected = steps_of(make_runner(folder, torch.float32, None)[0])
    logits = steps_of(runner)
    programs = runner._programs
    assert programs is not None and len(programs.refusals) == 3 and not programs.programs
    torch.testing.assert_close(logits[-1], expected[-1], atol=2e-5, rtol=1e-4)


def test_work_with_an_operation_of_torch_keeps_its_result() -> None:
    programs = StepPrograms()
    x = torch.ones(1, 8)
    for count in range(2, 6):
        assert programs.run("any", (1, 1), [x], lambda: x.add_(1))[0, 0] == count
    assert "add_" in programs.refusals["any", True, True]


def test_a_result_that_no_kernel_made_is_no_program() -> None:
    programs = StepPrograms()
    x = torch.zeros(1, 8)
    for _ in range(3):
        assert programs.run("any", (1, 1), [x], lambda: x) is x
    assert "the result" in programs.refusals["any", True, True]


@pytest.mark.parametrize("num_rows", [(5, 1), (4, 3)])
def test_a_step_of_too_many_rows_or_results_is_never_recorded(num_rows: tuple[int, int]) -> None:
    programs = StepPrograms(max_rows=4, max_results=2)
    x = torch.zeros(5, 8)
    for _ in range(3):
        programs.run("any", num_rows, [x], lambda: x)
    assert not programs.programs and not programs.refusals


def test_a_step_that_does_not_tell_where_it_goes_on_with_fewer_rows_is_no_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps_of(make_runner(folder, torch.float32, None)[0])
    monkeypatch.setattr(StepPrograms, "narrow", lambda _: None)
    runner, programs = make_runner(folder, torch.float32, None)
    check_equal(steps_of(runner), expected)
    assert [refusal for refusal in programs.refusals.values() if "rows in a step of" in refusal]
