"""The whole engine with Triton's kernels, interpreted: greedy ids are those of plain torch in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.build import build_model, choose_quantization
from engine.checkpoint.files import read_model_config
from engine.core import EngineCore
from engine.device import Device, find_interpreted
from engine.link.config import EngineConfig
from engine.runner import ModelRunner
from engine.scheduling.ngram import propose_ngram
from engine.scheduling.scheduler import NON_FINITE_ERROR
from engine.scheduling.speculate import Speculator
from engine.scheduling.step_costs import StepCosts
from engine.start import start_engine
from tests.contract.harness import (
    REFERENCES,
    Outcome,
    make_core,
    make_requests,
    make_runner,
    make_sequence,
    random_ids,
    run_requests,
    run_step,
)
from tests.diagonal import long_but
from tests.tiny_model import write_tiny_gptq, write_tiny_qwen2, write_tiny_qwen3

CHECKPOINTS = Path(__file__).parents[1] / "oracles" / "checkpoints"
MAX_NEW_TOKENS = 4
SIZES = [1, 17, 40]
NUM_BLOCKS = 32
PLAIN = dataclasses.replace(REFERENCES, matrices="torch")
"""Plain torch on the CPU, for which nothing is compiled."""


def interpreted() -> Device:
    device = find_interpreted(0)
    assert device is not None
    return device


def make_quantized_runner(folder: Path, device: Device, flag: str | None, dtype: torch.dtype) -> ModelRunner:
    config = read_model_config(folder)
    quantization = choose_quantization(config, folder, dtype, device, flag, None)
    runner = ModelRunner(build_model(config, folder, dtype, device, quantization), device)
    runner.allocate(NUM_BLOCKS, device.kv_dtype(dtype), num_positions=512)
    return runner


def core_of(
    folder: Path,
    runner: ModelRunner | None = None,
    *,
    num_blocks: int = NUM_BLOCKS,
    max_batch_tokens: int = 512,
    speculator: Speculator | None = None,
) -> EngineCore:
    """An engine on the device `interpreted` unless the runner is on another one."""
    return make_core(
        folder,
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        speculator=speculator,
        runner=runner or make_runner(folder, device=interpreted(), num_blocks=num_blocks),
    )


def make_prompts(num_shared_tokens: int = 0, sizes: Sequence[int] = SIZES) -> list[list[int]]:
    return [random_ids(num_shared_tokens, 9) + random_ids(size, size) for size in sizes]


def run(
    core: EngineCore, prompts: list[list[int]], *, max_new_tokens: int = MAX_NEW_TOKENS, is_staggered: bool = False
) -> Outcome:
    return run_requests(core, make_requests(prompts, max_new_tokens=max_new_tokens), is_staggered=is_staggered)


def expected_ids(folder: Path, prompts: list[list[int]], runner: ModelRunner | None = None) -> list[list[int]]:
    """The ids of plain torch."""
    return run(core_of(folder, runner or make_runner(folder, device=PLAIN)), prompts).token_ids


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> list[list[int]]:
    return expected_ids(tiny_model_dir, make_prompts())


@pytest.mark.long
def test_together(tiny_model_dir: Path, expected: list[list[int]]) -> None:
    assert run(core_of(tiny_model_dir), make_prompts()).token_ids == expected


@pytest.mark.long
def test_in_chunks_beside_others(tiny_model_dir: Path, expected: list[list[int]]) -> None:
    outcome = run(core_of(tiny_model_dir, max_batch_tokens=24), make_prompts(), is_staggered=True)
    assert outcome.most_running > 1
    assert outcome.token_ids == expected


@pytest.mark.long
def test_with_preemption(tiny_model_dir: Path) -> None:
    prompts = make_prompts(sizes=[31, 30])
    outcome = run(core_of(tiny_model_dir, num_blocks=5), prompts)
    assert outcome.num_preemptions > 0
    assert outcome.token_ids == expected_ids(tiny_model_dir, prompts)


def test_prefix_hits(tiny_model_dir: Path) -> None:
    prompts, core = make_prompts(num_shared_tokens=32, sizes=[3, 9]), core_of(tiny_model_dir)
    outcomes = [run(core, [prompt]) for prompt in prompts]
    assert outcomes[1].most_cached_tokens == 32
    assert [outcome.token_ids[0] for outcome in outcomes] == expected_ids(tiny_model_dir, prompts)


@pytest.mark.long
def test_drafts(tiny_model_dir: Path) -> None:
    part = random_ids(9, 3)
    prompts = [part * 3]
    speculator = Speculator(propose_ngram, StepCosts({1: 1.0, 64: 1.0}), 4)
    outcome = run(core_of(tiny_model_dir, speculator=speculator), prompts)
    assert outcome.token_ids == expected_ids(tiny_model_dir, prompts)


def test_a_sliding_window(tmp_path: Path) -> None:
    """The second layer sees 20 tokens."""
    window = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    write_tiny_qwen2(tmp_path, **window)
    prompts = make_prompts(sizes=[24])
    assert run(core_of(tmp_path), prompts).token_ids == expected_ids(tmp_path, prompts)


def test_a_qwen3(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path, num_hidden_layers=1, is_tied=False)
    prompts = make_prompts(sizes=[1, 20])
    assert run(core_of(tmp_path), prompts, max_new_tokens=2).token_ids == [
        ids[:2] for ids in expected_ids(tmp_path, prompts)
    ]


def check_checkpoint(name: str) -> None:
    """The ids of `transformers` on the dequantized weights: one from a prompt, one from a single row."""
    folder = CHECKPOINTS / name
    stored = np.load(folder / "expected.npz")
    prompt = stored["prompt_0"].tolist()
    assert run(core_of(folder), [prompt], max_new_tokens=2).token_ids == [stored["ids_0"][:2].tolist()]


@pytest.mark.parametrize("name", ["auto-gptq-4bit-g32-act", "autoawq-g32-zeros"])
def test_quantized_checkpoints(name: str) -> None:
    check_checkpoint(name)


def check_quantized_while_loading(method: str, tiny_model_dir: Path) -> None:
    prompts = make_prompts(sizes=[20])
    runners = [
        make_quantized_runner(tiny_model_dir, device, method, torch.float32) for device in (interpreted(), PLAIN)
    ]
    outcomes = [run(core_of(tiny_model_dir, runner), prompts, max_new_tokens=2) for runner in runners]
    assert outcomes[0].token_ids == outcomes[1].token_ids


@pytest.mark.long
def test_quantized_while_loading(tiny_model_dir: Path) -> None:
    check_quantized_while_loading("int8", tiny_model_dir)


@pytest.mark.parametrize("flag", long_but(["eetq", "int4", None], "int4"))
def test_a_tied_head_is_quantized_in_16_bits(flag: str | None, tmp_path: Path) -> None:
    """Table, head and sums where the kernels expect them; the logits are close to those of plain torch.

    Without a flag the checkpoint is GPTQ's, whose head is quantized on load.
    """
    (write_tiny_qwen2 if flag else write_tiny_gptq)(tmp_path)
    plain = dataclasses.replace(interpreted(), matrices="torch", ops="torch", attention="torch")
    logits = []
    for device in (interpreted(), plain):
        runner = make_quantized_runner(tmp_path, device, flag, torch.float16)
        logits.append(run_step(runner, [make_sequence(random_ids(12), [3])], [12]))
    assert logits[0].dtype == torch.float32
    assert not torch.equal(logits[0], logits[0].to(torch.float16).float()), "they are not rounded on the way"
    assert (logits[0] - logits[1]).abs().max() < 0.01 * logits[1].abs().max()


def test_a_request_that_is_not_finite_ends_alone(tmp_path: Path) -> None:
    """Also those that get its blocks afterwards, with its NaN in them, are not touched."""
    write_tiny_qwen2(tmp_path, num_hidden_layers=1, is_tied=False)
    good, bad = random_ids(9, 1), [*random_ids(20, 2), 7]
    good = [token_id for token_id in good if token_id != 7]
    folder_runner = make_runner(tmp_path, device=interpreted(), num_blocks=4)
    expected = expected_ids(tmp_path, [good])
    table = folder_runner._model.embed_tokens  # type: ignore[attr-defined]
    table._weight[7] = torch.nan
    core = core_of(tmp_path, folder_runner, num_blocks=4)
    for request in make_requests([good, bad], max_new_tokens=MAX_NEW_TOKENS):
        core.take(request)
    events = []
    while core.scheduler.has_work:
        events += core.step()
    names = [request.request_id for request in make_requests([good, bad], max_new_tokens=1)]
    ids = {name: [i for event in events if event.request_id == name for i in event.token_ids] for name in names}
    assert [event.error for event in events if event.error] == [NON_FINITE_ERROR]
    assert ids == {names[0]: expected[0], names[1]: []}
    assert run(core, [good]).token_ids == expected


def test_a_server_can_start_on_it(tiny_model_dir: Path) -> None:
    """By `--device interpreted`, as a proof without a GPU starts one: the ids are those of plain torch."""
    prompts = make_prompts(sizes=[9])
    limits = {"max_total_tokens": 64, "max_batch_prefill_tokens": 16}
    config = EngineConfig(
        model_path=str(tiny_model_dir), device="interpreted", dtype="float32", graph_sizes=(2,), **limits
    )
    core, ready = start_engine(config)
    assert ready.max_total_tokens == 64
    assert run(core, prompts).token_ids == expected_ids(tiny_model_dir, prompts)
