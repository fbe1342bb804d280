"""Steps that overlap: what is launched when, what is read when, and that nobody notices but by the time."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
import torch

from engine.core import EngineCore
from engine.device import Device, find_cpu
from engine.link.config import EngineConfig
from engine.link.ipc import EngineEndpoint, encode_frame
from engine.link.messages import AbortRequest, SamplingParams, TokenEvent
from engine.overlap import describe_overlap, why_not_overlap
from engine.runner import StepResult
from engine.sampling.sampler import FinishedTokens, PendingTokens, RawRows
from engine.sampling.sampler_torch import sample
from engine.scheduling import step_clock
from engine.scheduling.batch import SampledBatch, ScheduledBatch
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import NON_FINITE_ERROR, Scheduler
from engine.shedding import OUT_OF_MEMORY_ERROR
from engine.step_buffers import StepBuffers
from engine.step_inputs import step_inputs
from tests.unit.engine.builders import EOS, OverlappedSimulation, expected_output, make_request, next_token
from tests.unit.engine.core_builders import assemble_core, needs_tokens
from tests.unit.engine.test_core import outputs_of, serve_for

VOCAB_SIZE = 20


class JournalledRunner:
    """Computes `next_token`, of sequences with 13 NaN; takes unknown tokens from the last step. Notes what happens."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.num_launched = 0
        self.errors: dict[str, Exception] = {}
        """By `launch 2` or `read 2`, the second of each."""

    def execute(self, batch: ScheduledBatch, last_token_ids: torch.Tensor | None = None) -> StepResult:
        self.num_launched += 1
        self.note(f"launch {self.num_launched}")
        logits = torch.zeros(batch.num_rows, VOCAB_SIZE)
        for scheduled in batch.scheduled:
            tokens = list(scheduled.sequence.token_ids)
            if scheduled.sequence.has_unknown_token:
                assert last_token_ids is not None
                tokens[-1] = int(last_token_ids[scheduled.sequence.unknown_row])
            for row in scheduled.rows:
                logits[row, next_token(tokens)] = torch.nan if 13 in scheduled.sequence.request.prompt_token_ids else 10
        return StepResult(logits)

    def launch_sample(
        self,
        logits: torch.Tensor,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        raw: RawRows | None = None,
    ) -> PendingTokens:
        batch = sample(logits, params, positions, raw)
        return JournalledTokens(torch.tensor(batch.token_ids), batch, self.num_launched, self)

    def note(self, what: str) -> None:
        self.journal.append(what)
        if what in self.errors:
            raise self.errors[what]


@dataclasses.dataclass(frozen=True)
class JournalledTokens(FinishedTokens):
    number: int
    runner: JournalledRunner

    def read(self) -> SampledBatch:
        self.runner.note(f"read {self.number}")
        return self.batch


def make_core(
    runner: JournalledRunner, *, num_blocks: int = 64, max_batch_tokens: int = 64, is_overlapped: bool = True
) -> EngineCore:
    scheduler = Scheduler(
        BlockManager(num_blocks, 4), max_batch_tokens=max_batch_tokens, eos_token_ids=[EOS], needs_tokens=needs_tokens
    )
    return assemble_core(scheduler, runner, launch_sample=runner.launch_sample if is_overlapped else None)


def drain(core: EngineCore) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    while core.has_work:
        for event in core.step():
            events.setdefault(event.request_id, []).append(event)
        core.scheduler.check_integrity()
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    assert [event.is_terminal for event in events] == [False] * (len(events) - 1) + [True]
    return [token_id for event in events for token_id in event.token_ids]


REQUESTS = [make_request(f"r{number}", [number, 2, 3, 4, 5][: 2 + number % 4], 2 + number) for number in range(8)]


def test_each_step_is_launched_before_the_last_one_is_read() -> None:
    runner = JournalledRunner()
    core = make_core(runner)
    core.take(make_request("a", [1, 2, 3], max_new_tokens=3))
    assert core.step() == []
    events = [event for _ in range(3) for event in core.step()]
    assert runner.journal == ["launch 1", "launch 2", "read 1", "launch 3", "read 2", "read 3"]
    assert tokens_of(events) == expected_output(make_request("a", [1, 2, 3], max_new_tokens=3))
    assert not core.has_work


def test_everyone_gets_the_same_tokens() -> None:
    core = make_core(JournalledRunner(), num_blocks=8)
    for request in REQUESTS:
        core.take(request)
    events = drain(core)
    for request in REQUESTS:
        assert tokens_of(events[request.request_id]) == expected_output(request)
    assert core.scheduler.stats().num_used_blocks == 0


def test_a_request_that_ends_costs_a_row_in_vain() -> None:
    """Its end token is noticed when the next step is under way; a length is known before."""
    runner = JournalledRunner()
    core = make_core(runner)
    prompt = next(p for p in ([a, b] for a in range(20) for b in range(20)) if next_token(p) == EOS)
    core.take(make_request("ends", prompt, max_new_tokens=9))
    assert tokens_of(drain(core)["ends"]) == [EOS]
    assert runner.journal == ["launch 1", "launch 2", "read 1", "read 2"]


def test_one_that_needs_its_tokens_waits_alone() -> None:
    runner = JournalledRunner()
    core = make_core(runner)
    sampling = SamplingParams(frequency_penalty=0.1)
    core.take(msgspec.structs.replace(make_request("waits", [1, 2], max_new_tokens=3), sampling=sampling))
    assert tokens_of(drain(core)["waits"])
    assert runner.journal[:4] == ["launch 1", "read 1", "launch 2", "read 2"]


def test_a_request_that_is_not_finite_ends_once_and_alone() -> None:
    core = make_core(JournalledRunner())
    core.take(make_request("bad", [13, 1], max_new_tokens=5))
    core.take(make_request("good", [1, 2], max_new_tokens=5))
    events = drain(core)
    assert [(event.error, event.token_ids) for event in events["bad"]] == [(NON_FINITE_ERROR, [])]
    assert tokens_of(events["good"]) == expected_output(make_request("good", [1, 2], max_new_tokens=5))


@pytest.mark.parametrize("is_overlapped", [True, False])
@pytest.mark.parametrize("max_batch_tokens", [64, 8])
@pytest.mark.parametrize("num_tokens", range(1, 34))
def test_nobody_finds_the_blocks_of_a_prompt_that_is_not_finite(
    num_tokens: int, max_batch_tokens: int, is_overlapped: bool
) -> None:
    """Its last block may have a token that nobody knows, and the others what makes every later answer fail, too."""
    core = make_core(JournalledRunner(), max_batch_tokens=max_batch_tokens, is_overlapped=is_overlapped)
    for request_id in ("first", "second"):
        core.take(make_request(request_id, [13] * num_tokens, max_new_tokens=5))
        assert [event.error for event in drain(core)[request_id]] == [NON_FINITE_ERROR]
    stats = core.scheduler.stats()
    assert (stats.num_prefix_hit_tokens, stats.num_cached_blocks, stats.num_used_blocks) == (0, 0, 0)


@pytest.mark.parametrize("num_tokens", range(1, 10))
def test_what_a_launched_step_goes_on_to_fill_is_not_found_before_its_results(num_tokens: int) -> None:
    simulation = OverlappedSimulation(num_blocks=16)
    simulation.model = lambda token_ids: 9
    simulation.add("a", [1] * num_tokens, max_new_tokens=9)
    for _ in range(3):
        simulation.step()
    simulation.not_finite.add("a")  # from the next step on
    simulation.drain()
    assert simulation.output("a") == [9] * 3
    assert simulation.scheduler.stats().num_cached_blocks == 0


def test_an_abort_while_a_step_is_launched() -> None:
    core = make_core(JournalledRunner())
    core.take(make_request("a", [1, 2], max_new_tokens=9))
    core.step()
    core.take(AbortRequest("a"))
    assert core.has_work, "the launched step is still to be read"
    assert core.scheduler.stats().num_used_blocks == 0
    assert drain(core) == {}


def test_out_of_memory_beside_a_launched_step_is_tried_again() -> None:
    runner = JournalledRunner()
    runner.errors["launch 2"] = torch.OutOfMemoryError("no memory")
    core = make_core(runner)
    for request in REQUESTS:
        core.take(request)
    events = drain(core)
    for request in REQUESTS:
        assert tokens_of(events[request.request_id]) == expected_output(request)
    assert runner.journal[:4] == ["launch 1", "launch 2", "read 1", "launch 3"]


def test_out_of_memory_in_a_step_alone_ends_one_request() -> None:
    runner = JournalledRunner()
    runner.errors["launch 1"] = torch.OutOfMemoryError("no memory")
    core = make_core(runner)
    core.take(make_request("short", [1], max_new_tokens=2))
    core.take(make_request("long", [1, 2, 3], max_new_tokens=2))
    assert [(event.request_id, event.error) for event in core.step()] == [("long", OUT_OF_MEMORY_ERROR)]
    assert core.report.is_failed
    assert tokens_of(drain(core)["short"]) == expected_output(make_request("short", [1], max_new_tokens=2))


def served(
    runner: JournalledRunner, num_rounds: int
) -> tuple[list[list[list[int]]], list[list[bool]], list[str | None]]:
    """Tokens and failures of reports by frame, and errors, of a request that is served."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(encode_frame(make_request("a", [1, 2], max_new_tokens=2)))
        core = make_core(runner)
        if runner.errors:
            with pytest.raises(RuntimeError, match="broken"):
                core.serve(EngineEndpoint(ours))
        else:
            serve_for(core, EngineEndpoint(ours), num_rounds)
        outputs = outputs_of(theirs)
    tokens = [[event.token_ids for event in output.events] for output in outputs]
    failures = [[report.is_failed for report in output.reports] for output in outputs]
    return tokens, failures, [event.error for output in outputs for event in output.events]


def test_a_frame_goes_out_for_each_finished_step_and_none_for_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.core.HEARTBEAT_S", 0.01)
    tokens, failures, _ = served(JournalledRunner(), 3)
    first, second = expected_output(make_request("a", [1, 2], max_new_tokens=2))
    assert tokens == [[[first]], [[second]]]
    assert failures == [[False], [False]]


@pytest.mark.parametrize("moment", ["launch 1", "launch 2", "read 1", "read 2"])
def test_a_step_that_raises_ends_every_request_with_the_error(moment: str) -> None:
    runner = JournalledRunner()
    runner.errors[moment] = RuntimeError("broken")
    _, failures, errors = served(runner, 9)
    assert failures[-1] == [True]
    assert errors[-1] == "broken"
    assert sum(error is not None for error in errors) == 1


def test_times_of_steps_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step lasts from the end of the last one; the device begins with it when it has computed that one."""
    started, read_and_taken_in = [0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 20.0, 22.0]
    now = iter(started + read_and_taken_in)
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: next(now))
    first = step_clock.StepClock()
    first.end_scheduling()
    second = step_clock.StepClock(first)
    second.end_scheduling()
    for clock in (first, second):
        clock.begin_computing(ScheduledBatch())
        clock.end_computing()
        clock.end_updating()
        clock.finish([])
    reports = [first.report, second.report]
    assert [(r.total_s, r.schedule_s, r.forward_s, r.update_s) for r in reports] == [(11, 1, 9, 1), (11, 1, 10, 2)]


def test_one_that_is_preempted_while_a_step_is_launched_waits_for_it() -> None:
    """Otherwise a step could be scheduled from what the launched one is about to change."""
    simulation = OverlappedSimulation(num_blocks=7, max_batch_tokens=9)
    simulation.model = lambda token_ids: 9
    simulation.add("old", [1] * 8, max_new_tokens=9)
    simulation.add("new", [1] * 8 + [2] * 8)
    for max_tokens in (None, 2, 2, 2, 9):  # the last free block goes to "old", "new" computes a long part
        simulation.step(max_tokens)
    new = simulation.scheduler.running[1]
    simulation.step(2)
    assert new in simulation.scheduler.waiting, "there were blocks for it, and its beginning in the cache"
    assert not new.num_launched
    simulation.step(2)
    assert new in simulation.scheduler.running
    simulation.drain()
    assert simulation.output("new") == [9] * 4


def test_unknown_tokens_are_taken_from_the_last_step() -> None:
    simulation = OverlappedSimulation(num_blocks=16)
    for number in range(3):
        simulation.add(f"r{number}", [number, 1, 2], max_new_tokens=9)
    simulation.model = lambda token_ids: 10 + token_ids[0]
    simulation.step()
    batch = simulation.scheduler.schedule()
    inputs = step_inputs(batch)
    assert (inputs.unknown_places, inputs.unknown_rows) == ([0, 1, 2], [0, 1, 2])
    last_token_ids = torch.tensor([[10, 0], [11, 0], [12, 0]], dtype=torch.int32)[:, 0]
    items = torch.zeros(1, 4, dtype=torch.int32).numpy()
    step = StepBuffers(torch.device("cpu"), 4).fill(inputs, items, last_token_ids)
    assert step.input_ids.tolist() == [10, 11, 12]


ASYNCHRONOUS = dataclasses.replace(find_cpu(0), is_asynchronous=True, sampler="triton")


@pytest.mark.parametrize(
    ("device", "config", "line"),
    [
        (ASYNCHRONOUS, {}, "Steps overlap: each is launched before the tokens of the last one are read"),
        (ASYNCHRONOUS, {"is_overlap_disabled": True}, "Steps don't overlap: --disable-overlap"),
        (ASYNCHRONOUS, {"max_draft_tokens": 2}, "Steps don't overlap: speculation drafts on the host"),
        (
            find_cpu(0),
            {},
            "Steps don't overlap: the device computes while it is called; its sampler reads the tokens at once",
        ),
    ],
)
def test_when_steps_overlap(device: Device, config: dict[str, object], line: str) -> None:
    reasons = why_not_overlap(EngineConfig(model_path="any", **cast(Any, config)), device)
    assert describe_overlap(reasons) == line


def test_those_that_wait_for_results_keep_their_places_in_a_step() -> None:
    """Otherwise newcomers take them, and a later step has more tokens than there is memory for."""
    simulation = OverlappedSimulation(
        num_blocks=32, max_batch_tokens=2, needs_tokens=lambda sequence: sequence.request.request_id != "r3"
    )
    simulation.model = lambda token_ids: 9
    for number in range(9):
        simulation.add(f"r{number}", [number], max_new_tokens=6)
    while simulation.scheduler.has_work or simulation.launched is not None:
        assert simulation.step().num_tokens <= 2
        assert len(simulation.scheduler.running) <= 2
    assert all(simulation.output(f"r{number}") == [9] * 6 for number in range(9))
