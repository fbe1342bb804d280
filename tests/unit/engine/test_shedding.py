"""Out of memory while serving: one request ends with an error, the others get the ids that they get anyway."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
import torch

from engine.core import EngineCore
from engine.link.messages import SamplingParams, TokenEvent
from engine.ranks import Follower, Leader, Ranks
from engine.runner import ModelRunner, StepResult
from engine.sampling.sampler import RawRows
from engine.sampling.sampler_torch import sample
from engine.scheduling.batch import SampledBatch, ScheduledBatch
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.shedding import MAX_LONE_FAILURES, OUT_OF_MEMORY_ERROR
from engine.step_inputs import StepInputs
from parallel.state import RankLostError
from tests.unit.engine.builders import EOS, expected_output, make_request, make_speculator, next_token, scheduled_counts
from tests.unit.engine.core_builders import assemble_core
from tests.unit.engine.test_ranks import make_inputs

VOCAB_SIZE = 20
Fails = Callable[[ScheduledBatch], bool]


class SmallDevice:
    """Computes `next_token`; gives out of memory in the steps that `fails` says."""

    def __init__(self, fails: Fails) -> None:
        self._fails = fails
        self.failed: list[dict[str, int]] = []

    def execute(self, batch: ScheduledBatch) -> StepResult:
        if self._fails(batch):
            self.failed.append(scheduled_counts(batch))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        logits = torch.zeros(batch.num_rows, VOCAB_SIZE)
        for scheduled in batch.scheduled:
            known = scheduled.sequence.token_ids
            for index, row in enumerate(scheduled.rows):
                logits[row, next_token(known + scheduled.draft[:index])] = 10.0
        return StepResult(logits)


def make_core(runner: SmallDevice, *, max_draft_tokens: int = 0, **options: Any) -> EngineCore:
    scheduler = Scheduler(
        BlockManager(64, 4),
        max_batch_tokens=64,
        eos_token_ids=[EOS],
        drafter=make_speculator(max_draft_tokens) if max_draft_tokens else None,
    )
    return assemble_core(scheduler, runner, **options)


def run(core: EngineCore, prompts: dict[str, list[int]], num_steps_before: int = 0) -> dict[str, list[TokenEvent]]:
    """Serve until all have ended; the last request arrives after `num_steps_before` steps."""
    events: dict[str, list[TokenEvent]] = {name: [] for name in prompts}
    waiting = [make_request(name, prompt, 8) for name, prompt in prompts.items()]
    for request in waiting[:-1] if num_steps_before else waiting:
        core.take(request)
    num_steps = 0
    while core.scheduler.has_work or num_steps < num_steps_before:
        if num_steps == num_steps_before and num_steps_before:
            core.take(waiting[-1])
        for event in core.step():
            events[event.request_id].append(event)
        core.scheduler.check_integrity()
        num_steps += 1
    return events


def ids_of(events: list[TokenEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def check(events: dict[str, list[TokenEvent]], prompts: dict[str, list[int]], shed: set[str]) -> None:
    """Each has one terminal event, its last; those that were shed have the error, the others their ids."""
    for name, own in events.items():
        assert [event.is_terminal for event in own] == [False] * (len(own) - 1) + [True], name
        if name in shed:
            assert own[-1].error == OUT_OF_MEMORY_ERROR
        else:
            assert ids_of(own) == expected_output(make_request(name, prompts[name], 8))


PROMPTS = {"a": [1, 2, 3], "b": [4] * 9, "c": [5, 6]}


def failing_once(is_due: Fails) -> Fails:
    is_over = False

    def fails(batch: ScheduledBatch) -> bool:
        nonlocal is_over
        is_now, is_over = is_due(batch) and not is_over, is_over or is_due(batch)
        return is_now

    return fails


def test_the_longest_prompt_of_the_step_ends() -> None:
    runner = SmallDevice(failing_once(lambda batch: True))
    check(run(make_core(runner), PROMPTS), PROMPTS, {"b"})
    assert runner.failed == [{"a": 3, "b": 9, "c": 2}]


def test_a_prompt_ends_and_not_those_that_decode_beside_it() -> None:
    runner = SmallDevice(lambda batch: "c" in scheduled_counts(batch))
    check(run(make_core(runner), PROMPTS, num_steps_before=2), PROMPTS, {"c"})
    assert runner.failed == [{"a": 1, "b": 1, "c": 2}]


def test_while_all_decode_the_latest_ends() -> None:
    runner = SmallDevice(failing_once(lambda batch: batch.is_decoding and len(batch.scheduled) == 3))
    check(run(make_core(runner), PROMPTS), PROMPTS, {"c"})


def test_requests_end_one_by_one_until_the_rest_fits() -> None:
    runner = SmallDevice(lambda batch: len(batch.scheduled) > 1)
    check(run(make_core(runner), PROMPTS), PROMPTS, {"a", "b"})
    assert runner.failed == [{"a": 3, "b": 9, "c": 2}, {"a": 3, "c": 2}]


def test_drafts_are_taken_back() -> None:
    runner = SmallDevice(lambda batch: any(len(s.draft) > 2 for s in batch.scheduled) and len(batch.scheduled) > 1)
    core = make_core(runner, max_draft_tokens=4)
    check(run(core, PROMPTS), PROMPTS, {name for counts in runner.failed for name in [[*counts][-1]]})
    assert runner.failed
    assert core.scheduler.stats().num_used_blocks == 0


def test_the_draw_may_run_out_of_memory_as_well() -> None:
    """Penalties have counted the tokens of the step by then, and do not count them again."""
    calls = 0

    def failing_sample(logits: torch.Tensor, params: Any, positions: Any, raw: RawRows | None = None) -> SampledBatch:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("no memory")
        return sample(logits, params, positions, raw)

    class CloseLogits(SmallDevice):
        """The best token is little better than others, so that penalties decide."""

        def execute(self, batch: ScheduledBatch) -> StepResult:
            near = torch.linspace(0.0, 9.0, VOCAB_SIZE)
            return StepResult(super().execute(batch).logits + near)

    def outputs(sampler: Any, **penalties: float) -> dict[str, list[int]]:
        core = make_core(CloseLogits(lambda batch: False), sample=sampler)
        for name in "ab":
            request = make_request(name, [1, 2, 3], 12)
            core.take(msgspec.structs.replace(request, sampling=SamplingParams(**penalties)))
        events: dict[str, list[int]] = {"a": [], "b": []}
        while core.scheduler.has_work:
            for event in core.step():
                events[event.request_id] += event.token_ids
        return events

    penalties = {"repetition_penalty": 1.7, "frequency_penalty": 0.4}
    expected = outputs(sample, **penalties)["a"]
    assert outputs(failing_sample, **penalties)["a"] == expected
    assert calls > 4 and expected != outputs(sample)["a"]


def test_a_failed_step_is_reported_as_one() -> None:
    core = make_core(SmallDevice(failing_once(lambda batch: True)))
    core.take(make_request("a", [1]))
    core.step()
    assert core.report.is_failed and core.report.num_sequences == 1


def test_serving_ends_with_the_cause_when_nobody_can_be_served() -> None:
    core = make_core(SmallDevice(lambda batch: True))
    for index in range(MAX_LONE_FAILURES - 1):
        core.take(make_request(str(index), [1]))
        (event,) = core.step()
        assert event.error == OUT_OF_MEMORY_ERROR
    core.take(make_request("last", [1]))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        core.step()


def test_large_requests_far_apart_end_nothing_but_themselves() -> None:
    core = make_core(SmallDevice(lambda batch: batch.num_tokens > 30))
    for index in range(2 * MAX_LONE_FAILURES):
        prompts = {"large": [1] * 40, "small": [index]}
        check({"large": run(core, {"large": prompts["large"]})["large"]}, prompts, {"large"})
        check(run(core, {"small": prompts["small"]}), prompts, set())


class FakeRanks:
    peers: list[Any] = []
    world = types.SimpleNamespace(rank=2)

    def check(self) -> None:
        pass

    def share_token_ids(self, inputs: StepInputs, last_token_ids: torch.Tensor | None) -> None:
        pass


def test_a_rank_out_of_memory_ends_all_ranks_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait in the same step: none can take it back."""

    def run_out(inputs: StepInputs, last_token_ids: torch.Tensor | None) -> StepResult:
        raise torch.OutOfMemoryError("no memory")

    runner = cast(ModelRunner, types.SimpleNamespace(adapters=None, inputs=lambda batch: make_inputs([]), run=run_out))
    ranks = cast(Ranks, FakeRanks())
    with pytest.raises(RankLostError, match=r"^rank 0 ran out of memory in a step: lower --max-batch-prefill-tokens"):
        Leader(runner, ranks).execute(ScheduledBatch())
    monkeypatch.setattr("engine.ranks._decisions", lambda control: iter([make_inputs([])]))
    FakeRanks.peers = [types.SimpleNamespace(control=None)]
    with pytest.raises(RankLostError, match=r"^rank 2 ran out of memory in a step: lower --max-batch-prefill-tokens"):
        Follower(runner, ranks).serve()
