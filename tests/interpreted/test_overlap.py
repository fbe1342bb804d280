"""Steps that overlap, on the interpreted device: the tokens are those of steps one after the other, and of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from torch.utils._python_dispatch import TorchDispatchMode

from engine.core import EngineCore
from engine.graphs import GraphLimits
from engine.link.messages import GenerationRequest, SamplingParams
from engine.overlap import OverlappedCore
from engine.runner import ModelRunner
from engine.sampling import grammar_triton, sampler_triton
from engine.sampling.batch_sampler import LaunchingBatchSampler
from engine.sampling.sampler import PendingTokens, RawRows
from engine.step_buffers import StepBuffers
from quant.kernels.transfer import HostCopy
from tests.contract.harness import BLOCK_SIZE, Outcome, make_core, make_requests, make_runner, run_requests
from tests.diagonal import long_but
from tests.fake_device import GPU, no_numbers
from tests.interpreted.test_engine import PLAIN, interpreted, make_prompts
from tests.no_reads import READING_METHODS, NoReads, ReadError

NUM_BLOCKS = 32
GRAPHS = GraphLimits(sizes=(1, 4), max_seq_len=NUM_BLOCKS * BLOCK_SIZE, num_kv_tokens=NUM_BLOCKS * BLOCK_SIZE)
GRAMMAR = LLMatcher.grammar_from_regex("[a-z ]+")


@pytest.fixture(scope="module")
def runner(tiny_model_dir: Path) -> ModelRunner:
    return make_runner(tiny_model_dir, device=interpreted(), num_blocks=NUM_BLOCKS)


def make_overlapped(folder: Path, runner: ModelRunner, *, num_blocks: int = NUM_BLOCKS, **options: Any) -> EngineCore:
    return make_core(
        folder,
        num_blocks=num_blocks,
        runner=runner,
        sample=sampler_triton.sample,
        launch_sample=sampler_triton.launch_sample,
        apply_masks=grammar_triton.apply_masks,
        **options,
    )


def in_torch(folder: Path, requests: list[GenerationRequest]) -> Outcome:
    return run_requests(make_core(folder, runner=make_runner(folder, device=PLAIN)), requests)


def plain_requests() -> list[GenerationRequest]:
    return make_requests(make_prompts(), max_new_tokens=4)


@pytest.mark.parametrize("max_batch_tokens", long_but([512, 24], 24))
def test_together_and_in_chunks(tiny_model_dir: Path, runner: ModelRunner, max_batch_tokens: int) -> None:
    core = make_overlapped(tiny_model_dir, runner, max_batch_tokens=max_batch_tokens)
    outcome = run_requests(core, plain_requests(), is_staggered=max_batch_tokens == 24)
    assert outcome.token_ids == in_torch(tiny_model_dir, plain_requests()).token_ids
    assert outcome.most_running > 1
    core.scheduler.check_integrity()


def test_with_preemption(tiny_model_dir: Path, runner: ModelRunner) -> None:
    requests = make_requests(make_prompts(sizes=[31, 30]), max_new_tokens=5)
    outcome = run_requests(make_overlapped(tiny_model_dir, runner, num_blocks=5), requests)
    assert outcome.num_preemptions > 0
    assert outcome.token_ids == in_torch(tiny_model_dir, requests).token_ids


@pytest.mark.long
def test_prefix_hits(tiny_model_dir: Path, runner: ModelRunner) -> None:
    core = make_overlapped(tiny_model_dir, runner)
    for number, prompt in enumerate(make_prompts(num_shared_tokens=32, sizes=[3, 9])):
        requests = make_requests([prompt], max_new_tokens=4)
        outcome = run_requests(core, requests)
        assert outcome.token_ids == in_torch(tiny_model_dir, requests).token_ids
        assert outcome.most_cached_tokens == 32 * number


def test_graphs_take_tokens_that_the_host_does_not_know(tiny_model_dir: Path) -> None:
    runner = make_runner(tiny_model_dir, device=interpreted(), num_blocks=NUM_BLOCKS)
    runner.capture(GRAPHS)
    outcome = run_requests(make_overlapped(tiny_model_dir, runner), plain_requests())
    assert outcome.token_ids == in_torch(tiny_model_dir, plain_requests()).token_ids


def mixed_requests() -> list[GenerationRequest]:
    """One of each kind: plain with top tokens, drawn, with penalties, watermarked, held to a grammar, scored."""
    samplings = [
        SamplingParams(num_top_tokens=3),
        SamplingParams(seed=3, temperature=1.5, top_p=0.9),
        SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5),
        SamplingParams(is_watermarked=True, is_logprob_filtered=True),
        SamplingParams(),
        SamplingParams(),
    ]
    prompts = make_prompts(sizes=[5, 4, 3, 6, 2, 7])
    requests = [
        msgspec.structs.replace(request, sampling=sampling)
        for request, sampling in zip(make_requests(prompts, max_new_tokens=4), samplings, strict=True)
    ]
    requests[4] = msgspec.structs.replace(requests[4], grammar=GRAMMAR)
    requests[5] = msgspec.structs.replace(requests[5], has_prompt_logprobs=True)
    return requests


def test_those_that_need_their_tokens_wait_and_others_go_on(tiny_model_dir: Path, runner: ModelRunner) -> None:
    core = make_overlapped(tiny_model_dir, runner)
    outcome, expected = run_requests(core, mixed_requests()), in_torch(tiny_model_dir, mixed_requests())
    assert outcome.token_ids == expected.token_ids
    for got, wanted in zip(outcome.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert [[ids for ids, _ in tokens] for tokens in outcome.top_tokens] == [
        [ids for ids, _ in tokens] for tokens in expected.top_tokens
    ]


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When steps are launched, and when their results are read."""
    notes: list[str] = []
    fill, read = StepBuffers.fill, HostCopy.read

    def noted_fill(*args: Any, **kwargs: Any) -> Any:
        notes.append("launch")
        return fill(*args, **kwargs)

    def noted_read(copy: HostCopy) -> Any:
        numbers = read(copy)
        if numbers.size:  # nothing is scored here
            notes.append("read")
        return numbers

    monkeypatch.setattr(StepBuffers, "fill", noted_fill)
    monkeypatch.setattr(HostCopy, "read", noted_read)
    return notes


def test_a_step_is_read_once_and_after_the_next_is_launched(
    tiny_model_dir: Path, runner: ModelRunner, journal: list[str]
) -> None:
    run_requests(make_overlapped(tiny_model_dir, runner), make_requests(make_prompts(sizes=[3]), max_new_tokens=4))
    assert journal == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


FAULTS: dict[str, Callable[[PendingTokens], object]] = {
    "item": lambda tokens: tokens.token_ids[0].item(),
    "tolist": lambda tokens: tokens.token_ids.tolist(),
    "bool": lambda tokens: bool((tokens.token_ids > 0).all()),
    "early": lambda tokens: tokens.read(),
    "nonzero": lambda tokens: tokens.token_ids.nonzero(),
}


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launching a step reads nothing of the device. The sampler chooses token 1: its kernels, interpreted, read."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ReadError

    def choose_one(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.dtype == torch.int32:
                argument.fill_(1)

    launch = OverlappedCore._launch

    def guarded(*args: Any) -> Any:
        with monkeypatch.context() as patch, NoReads():
            for name in READING_METHODS:
                patch.setattr(torch.Tensor, name, refuse)
            patch.setattr(HostCopy, "read", refuse)
            return launch(*args)

    monkeypatch.setattr(OverlappedCore, "_launch", guarded)
    monkeypatch.setattr(sampler_triton, "launch", choose_one)


def run_without_reads(folder: Path) -> Outcome:
    requests = make_requests(make_prompts(sizes=[3, 20]), max_new_tokens=4)
    requests[1] = msgspec.structs.replace(requests[1], has_prompt_logprobs=True)
    return run_requests(make_overlapped(folder, make_runner(folder, device=PLAIN)), requests)


@pytest.mark.usefixtures("no_reads")
def test_launching_a_step_reads_nothing(tiny_model_dir: Path) -> None:
    assert run_without_reads(tiny_model_dir).token_ids == [[1] * 4] * 2


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_read_is_found(tiny_model_dir: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LaunchingBatchSampler.launch

    def planted(*args: Any) -> PendingTokens:
        tokens = launch(*args)
        FAULTS[fault](tokens)
        return tokens

    monkeypatch.setattr(LaunchingBatchSampler, "launch", planted)
    with pytest.raises(ReadError):
        run_without_reads(tiny_model_dir)


class BlockingCopies(TorchDispatchMode):
    """Notes copies between host and device that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.num_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        if "copy" in func.name() and len({tensor.device.type for tensor in tensors}) > 1:
            self.num_copies += 1
            if not (kwargs.get("non_blocking") or True in args[2:3]):
                self.names.append(func.name())
        return result


def sample_on_a_gpu() -> BlockingCopies:
    """Everything that sampling sends to a GPU that is not there: parameters, rows to keep, masks."""
    params = [SamplingParams(num_top_tokens=2), SamplingParams(seed=1, top_p=0.5), SamplingParams()]
    with no_numbers():
        logits = torch.zeros(3, 100, device=GPU)
        with BlockingCopies() as copies:
            raw = RawRows.of(logits, [1, 2], params)
            grammar_triton.apply_masks(logits, np.zeros(1, np.int32), np.zeros((1, 4), np.int32))
            sampler_triton.launch_sample(logits, params, [0, 1, 2], raw)
    return copies


def test_the_host_waits_for_no_copy_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results come back through `HostCopy`, which needs a GPU's pinned memory."""
    monkeypatch.setattr(sampler_triton, "HostCopy", lambda tensor: None)
    copies = sample_on_a_gpu()
    assert copies.names == []
    assert copies.num_copies == 4
    monkeypatch.setattr(sampler_triton, "to_device", lambda array, device: torch.from_numpy(array).to(device))
    assert sample_on_a_gpu().names == ["aten::_to_copy"]
