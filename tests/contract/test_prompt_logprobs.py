"""Prompt logprobs against `transformers`, and the same bits however the prompt is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numba
import pytest
import torch

from engine import runner as runner_module
from engine.build import build_model, choose_quantization
from engine.checkpoint.files import read_model_config
from engine.link.messages import GenerationRequest, TokenEvent
from engine.runner import ModelRunner, StepResult
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.scheduler import NON_FINITE_ERROR
from parallel.state import ParallelState
from tests.contract.harness import KERNELS, REFERENCES, make_core, make_runner, oracle_logits, random_ids
from tests.unit.parallel.threads import run_ranks

PROMPTS = [random_ids(size, seed=size) for size in (1, 2, 65, 150)]


def make_request(number: int, *, has_prompt_logprobs: bool = True, max_new_tokens: int = 6) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"r{number}",
        prompt_token_ids=PROMPTS[number],
        max_new_tokens=max_new_tokens,
        has_prompt_logprobs=has_prompt_logprobs,
    )


def expected_logprobs(folder: Path, token_ids: list[int]) -> list[float]:
    """The logprobs that `transformers` has for every token but the first."""
    rows = oracle_logits(folder, token_ids)[:-1].log_softmax(dim=1)
    expected: list[float] = rows.gather(1, torch.tensor(token_ids[1:], dtype=torch.int64).unsqueeze(1))[:, 0].tolist()
    return expected


def run(core: Any, requests: list[GenerationRequest]) -> dict[str, list[TokenEvent]]:
    """Events of each request. All requests are there from the start."""
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.take(request)
    while core.scheduler.has_work:
        for event in core.step():
            events[event.request_id].append(event)
    return events


@pytest.mark.parametrize("device", [KERNELS, REFERENCES], ids=["kernels", "references"])
def test_float32_equals_transformers(device: Any, tiny_model_dir: Path) -> None:
    core = make_core(tiny_model_dir, runner=make_runner(tiny_model_dir, device=device))
    events = run(core, [make_request(number) for number in range(4)])
    for number, prompt in enumerate(PROMPTS):
        first, *others = events[f"r{number}"]
        assert first.prompt_logprobs == pytest.approx(expected_logprobs(tiny_model_dir, prompt), abs=1e-4)
        assert all(not event.prompt_logprobs for event in others)


def with_tops(number: int, num_top: int) -> GenerationRequest:
    return msgspec.structs.replace(make_request(number), num_prompt_top_tokens=num_top)


def with_ranks(request: GenerationRequest) -> GenerationRequest:
    return msgspec.structs.replace(request, has_prompt_ranks=True)


@pytest.mark.parametrize("device", [KERNELS, REFERENCES], ids=["kernels", "references"])
def test_ranks_count_the_tokens_that_are_as_likely_to_transformers(device: Any, tiny_model_dir: Path) -> None:
    """In one batch, where some want ranks, some likeliest tokens, some both, and the prompts come in pieces."""
    core = make_core(tiny_model_dir, runner=make_runner(tiny_model_dir, device=device), max_batch_tokens=64)
    requests = [with_ranks(make_request(0)), with_tops(1, 2), make_request(2), with_ranks(with_tops(3, 3))]
    events = run(core, requests)
    for number, request in enumerate(requests):
        first, *others = events[f"r{number}"]
        assert not any(event.prompt_ranks for event in others)
        assert len(first.prompt_ranks) == (len(PROMPTS[number]) - 1 if request.has_prompt_ranks else 0)
        if number == 3:
            tops = zip(PROMPTS[3][1:], first.prompt_top_token_ids, first.prompt_ranks, strict=True)
            assert all((token_id in top) == (rank <= 3) for token_id, top, rank in tops)
        if not first.prompt_ranks:
            continue
        logits = oracle_logits(tiny_model_dir, PROMPTS[number])[:-1]
        own = logits.gather(1, torch.tensor(PROMPTS[number][1:]).unsqueeze(1))
        fewest, most = ((logits >= own + slack).sum(1) for slack in (1e-3, -1e-3))
        ranks = torch.tensor(first.prompt_ranks)
        assert ((fewest <= ranks) & (ranks <= most)).all() and (ranks >= 1).all()


@pytest.mark.parametrize("device", [KERNELS, REFERENCES], ids=["kernels", "references"])
def test_the_likeliest_tokens_equal_those_of_transformers(device: Any, tiny_model_dir: Path) -> None:
    """In one batch, where each request wants its own number of them, and the prompts come in pieces."""
    core = make_core(tiny_model_dir, runner=make_runner(tiny_model_dir, device=device), max_batch_tokens=64)
    events = run(core, [with_tops(0, 2), with_tops(1, 0), with_tops(2, 1), with_tops(3, 5)])
    for number, num_top in ((0, 2), (1, 0), (2, 1), (3, 5)):
        first, *others = events[f"r{number}"]
        assert first.prompt_logprobs == pytest.approx(expected_logprobs(tiny_model_dir, PROMPTS[number]), abs=1e-4)
        rows = oracle_logits(tiny_model_dir, PROMPTS[number])[:-1].log_softmax(dim=1)
        if not num_top:
            assert first.prompt_top_token_ids == []
            continue
        best = rows.topk(num_top, dim=1)
        assert first.prompt_top_token_ids == best.indices.tolist()
        logprobs = [logprob for row in first.prompt_top_logprobs for logprob in row]
        assert logprobs == pytest.approx(best.values.flatten().tolist(), abs=1e-4)
        assert all(not event.prompt_top_token_ids for event in others)


def test_a_preemption_keeps_the_likeliest_tokens(tiny_model_dir: Path) -> None:
    (expected, *_) = run(make_core(tiny_model_dir), [with_ranks(with_tops(3, 2))])["r3"]
    core = make_core(tiny_model_dir, max_batch_tokens=64)
    core.take(with_ranks(with_tops(3, 2)))
    core.step()
    core.scheduler.preempt(core.scheduler.running[0])
    events = []
    while core.scheduler.has_work:
        events += core.step()
    assert events[0].prompt_top_token_ids == expected.prompt_top_token_ids
    assert events[0].prompt_top_logprobs == expected.prompt_top_logprobs
    assert events[0].prompt_ranks == expected.prompt_ranks
    assert len(expected.prompt_top_token_ids) == 149


CONDITIONS: dict[str, dict[str, Any]] = {
    "small chunks": {"max_batch_tokens": 7},
    "chunks": {"max_batch_tokens": 64},
    "no cache": {"is_prefix_caching": False},
}


@pytest.mark.parametrize("options", CONDITIONS.values(), ids=CONDITIONS)
def test_the_same_bits_under_conditions(options: dict[str, Any], tiny_model_dir: Path) -> None:
    whole = run(make_core(tiny_model_dir), [make_request(number) for number in range(4)])
    events = run(make_core(tiny_model_dir, **options), [make_request(number) for number in range(4)])
    for name in whole:
        assert events[name][0].prompt_logprobs == whole[name][0].prompt_logprobs
        assert [event.token_ids for event in events[name]] == [event.token_ids for event in whole[name]]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_a_preemption_neither_loses_nor_repeats_any(num_steps: int, tiny_model_dir: Path) -> None:
    """150 tokens in chunks of 64; after the third step there are tokens of output, too."""
    (expected, *_) = run(make_core(tiny_model_dir), [make_request(3)])["r3"]
    core = make_core(tiny_model_dir, max_batch_tokens=64)
    core.take(make_request(3))
    events = [event for _ in range(num_steps) for event in core.step()]
    core.scheduler.preempt(core.scheduler.running[0])
    while core.scheduler.has_work:
        events += core.step()
    assert events[0].prompt_logprobs == expected.prompt_logprobs
    assert all(not event.prompt_logprobs for event in events[1:])
    assert sum(len(event.token_ids) for event in events) == 6


def test_the_cache_is_written_and_not_read(tiny_model_dir: Path) -> None:
    core = make_core(tiny_model_dir)
    first = run(core, [make_request(3)])["r3"]
    assert run(core, [make_request(3)])["r3"][0].prompt_logprobs == first[0].prompt_logprobs
    core.take(make_request(3, has_prompt_logprobs=False))
    (event,) = core.step()
    assert event.prompt_logprobs == []
    assert core.scheduler.running[0].num_cached_tokens == 149


def test_only_some_rows_of_logits_exist_at_a_time(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(tiny_model_dir)
    compute, seen = runner._model.compute_logits, []

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return compute(hidden)

    monkeypatch.setattr(runner_module, "SCORED_ROWS", 40)
    runner._model.compute_logits = watched  # type: ignore[method-assign]
    core = make_core(tiny_model_dir, runner=runner)
    core.take(make_request(3))
    core.step()
    assert seen == [1, 40, 40, 40, 29]
    core.step()
    assert seen[5:] == [1]


def test_a_score_that_is_no_number_ends_the_request(tiny_model_dir: Path) -> None:
    class BadRunner:
        def execute(self, batch: ScheduledBatch) -> StepResult:
            return StepResult(torch.zeros(1, 8), [torch.tensor([-1.0, torch.nan, *[-1.0] * 62])])

    core = make_core(tiny_model_dir)
    core.runner = BadRunner()
    core.take(make_request(2))
    assert [(event.error, event.token_ids) for event in core.step()] == [(NON_FINITE_ERROR, [])]
    assert not core.scheduler.has_work


def read_scores(runner: ModelRunner, batch: ScheduledBatch) -> list[float]:
    scores: list[float] = runner.execute(batch).copy_scores().read().tolist()
    return scores


@pytest.mark.parametrize("size", [2, 3])
def test_on_shards(size: int, tiny_model_dir: Path) -> None:
    """The head is cut by rows of the vocabulary: every rank takes part in each piece, and rank 0 has the numbers."""
    config = read_model_config(tiny_model_dir)
    quantization = choose_quantization(config, tiny_model_dir, torch.float32, KERNELS, None, None)

    def work(parallel: ParallelState) -> list[float]:
        numba.set_num_threads(1)
        model = build_model(config, tiny_model_dir, torch.float32, KERNELS, quantization, parallel)
        runner = ModelRunner(model, KERNELS)
        runner.allocate(16, torch.float32, num_positions=256)
        core = make_core(tiny_model_dir, runner=runner, max_batch_tokens=100)
        core.take(make_request(3))
        first = core.scheduler.schedule()
        result = read_scores(runner, first)
        sequence = first.scheduled[0].sequence
        sequence.num_computed_tokens, sequence.prompt_logprobs = 100, result or [0.0] * 100
        second = core.scheduler.schedule()
        return result + read_scores(runner, second)

    rank0, *others = run_ranks(size, work)
    assert rank0 == pytest.approx(expected_logprobs(tiny_model_dir, PROMPTS[3]), abs=1e-4)
    assert all(rank == [] for rank in others)
