"""The loop around the step: what comes in between two steps, what goes out, and how it ends."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import pytest
import torch

import engine.core
from engine.core import UNLOADED_ERROR, AdapterFiles, EngineCore
from engine.link.errors import StartError
from engine.link.ipc import EngineEndpoint, decode_up, encode_frame, take_frames
from engine.link.messages import (
    AbortRequest,
    Down,
    EngineReady,
    FinishReason,
    GenerationRequest,
    LoadAdapter,
    SamplingParams,
    StepOutput,
    UnloadAdapter,
)
from engine.runner import StepResult
from engine.sampling.sampler import RawRows, Sample
from engine.sampling.sampler_torch import sample
from engine.scheduling.adapters import AdapterCache
from engine.scheduling.batch import SampledBatch, ScheduledBatch
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import NON_FINITE_ERROR, Scheduler
from engine.scheduling.step_limit import StepLimit
from tests.unit.engine.builders import EOS, make_request, scheduled_counts
from tests.unit.engine.core_builders import assemble_core

VOCAB_SIZE = 20


class CountingRunner:
    """The next token is the number of tokens so far; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[dict[str, int]] = []
        self.error: Exception | None = None

    def execute(self, batch: ScheduledBatch) -> StepResult:
        self.batches.append(scheduled_counts(batch))
        if self.error is not None:
            raise self.error
        logits = torch.zeros(batch.num_rows, VOCAB_SIZE)
        for scheduled in batch.scheduled:
            logits[scheduled.rows, scheduled.sequence.num_tokens % VOCAB_SIZE] = 10.0
            if 13 in scheduled.sequence.token_ids:
                logits[scheduled.rows] = torch.nan
        return StepResult(logits, [])


def make_core(runner: CountingRunner, sample: Sample = sample, adapter_files: AdapterFiles | None = None) -> EngineCore:
    adapters = AdapterCache(0 if adapter_files is None else 2)
    scheduler = Scheduler(BlockManager(16, 4), max_batch_tokens=32, eos_token_ids=[EOS], adapters=adapters)
    return assemble_core(scheduler, runner, sample=sample, limit=StepLimit(1.0, 5.0), adapter_files=adapter_files)


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[EngineEndpoint, socket.socket]]:
    monkeypatch.setattr(engine.core, "HEARTBEAT_S", 0.01)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield EngineEndpoint(ours), theirs


def serve_for(core: EngineCore, endpoint: EngineEndpoint, num_rounds: int) -> list[float]:
    """Serve until the HTTP process goes after so many rounds; how long each waited for messages."""
    receive = endpoint.receive
    waits: list[float] = []

    def receive_and_count(timeout_s: float) -> list[Down]:
        if len(waits) == num_rounds:
            raise EOFError
        waits.append(timeout_s)
        return receive(timeout_s)

    endpoint.receive = receive_and_count  # type: ignore[method-assign]
    with pytest.raises(EOFError):
        core.serve(endpoint)
    return waits


def outputs_of(peer: socket.socket) -> list[StepOutput]:
    """Everything that was sent; all of it fits the socket's buffer."""
    peer.setblocking(False)
    buffer = bytearray()
    try:
        while data := peer.recv(1 << 16):
            buffer += data
    except BlockingIOError:
        pass
    messages: list[StepOutput | EngineReady] = take_frames(buffer, decode_up)
    return [message for message in messages if isinstance(message, StepOutput)]


def test_a_step_is_schedule_run_sample_update() -> None:
    runner = CountingRunner()
    core = make_core(runner)
    core.take(make_request("a", [1, 2, 3], max_new_tokens=3))
    core.take(make_request("b", [1, 2], max_new_tokens=1))
    events = core.step()
    assert runner.batches == [{"a": 3, "b": 2}]
    assert [(event.request_id, event.token_ids, event.finish_reason) for event in events] == [
        ("a", [3], None),
        ("b", [2], FinishReason.LENGTH),
    ]
    assert events[0].logprobs[0] == pytest.approx(10 - torch.tensor([10.0] + [0.0] * 19).logsumexp(0).item(), abs=1e-5)
    assert [event.token_ids for event in core.step()] == [[4]]


def test_a_step_reports_what_it_computed_and_how_long_its_parts_took() -> None:
    core = make_core(CountingRunner())
    core.take(make_request("a", [1], max_new_tokens=9))
    core.step()
    assert (core.report.is_prefill, core.report.num_sequences, core.report.num_admitted) == (True, 1, 1)
    core.step()
    assert (core.report.is_prefill, core.report.num_sequences, core.report.num_admitted) == (False, 1, 0)
    core.take(make_request("b", [1, 2], max_new_tokens=9))
    core.step()
    report = core.report
    assert (report.is_prefill, report.num_sequences, report.num_admitted) == (True, 2, 1)
    assert report.num_draft_hits == [0, 0]
    parts = report.schedule_s, report.forward_s, report.update_s
    assert min(parts) > 0 and sum(parts) == pytest.approx(report.total_s)


def test_a_request_that_is_not_finite_ends_and_the_others_go_on() -> None:
    core = make_core(CountingRunner())
    core.take(make_request("bad", [13, 1], max_new_tokens=3))
    core.take(make_request("good", [1, 2], max_new_tokens=3))
    events = core.step()
    assert [(event.request_id, event.error, event.token_ids) for event in events] == [
        ("bad", NON_FINITE_ERROR, []),
        ("good", None, [2]),
    ]


def test_an_abort_between_steps_frees_the_request() -> None:
    core = make_core(CountingRunner())
    core.take(make_request("a", [1, 2], max_new_tokens=9))
    core.step()
    core.take(AbortRequest("a"))
    core.take(AbortRequest("a"))
    assert not core.scheduler.has_work
    assert core.scheduler.stats().num_used_blocks == 0


def test_prompts_are_cut_to_the_step_limit_unless_their_request_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CountingRunner()
    core = make_core(runner)
    # 20 tokens a second: 20 fit the limit, one of which is decoded and has a row; 100 that of a request alone.
    core.limit.calibrate(100, few_s=0.001, many_s=5.0)
    monkeypatch.setattr(core.limit, "observe", lambda batch, seconds: None)
    core.take(make_request("a", [1] * 30, max_new_tokens=2))
    core.step()
    core.take(make_request("b", [2] * 25, max_new_tokens=2))
    core.step()
    assert runner.batches == [{"a": 30}, {"a": 1, "b": 18}]


def test_the_step_limit_learns_from_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(CountingRunner())
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(core.limit, "observe", lambda batch, seconds: seen.append((batch.num_tokens, seconds > 0)))
    core.take(make_request("a", [1] * 30, max_new_tokens=2))
    core.step()
    core.step()
    assert seen == [(30, True), (1, True)]


def test_seeded_draws_depend_on_the_output_position() -> None:
    """The prompt's length, chunks and preemption must not matter: the position is that of the output token."""
    seen: list[list[int]] = []

    def spy(
        logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], raw: RawRows | None = None
    ) -> SampledBatch:
        seen.append(list(positions))
        return sample(logits, params, positions, raw)

    core = make_core(CountingRunner(), spy)
    core.take(make_request("a", [1, 2, 3], max_new_tokens=9))
    core.step()
    core.scheduler.preempt(core.scheduler.running[0])
    core.step()
    core.take(make_request("b", [1], max_new_tokens=9))
    core.step()
    assert seen == [[0], [1], [2, 0]]


def test_serve_sends_one_output_per_step_and_heartbeats_when_idle(
    sockets: tuple[EngineEndpoint, socket.socket],
) -> None:
    endpoint, peer = sockets
    peer.sendall(encode_frame(make_request("a", [1, 2], max_new_tokens=2)))
    serve_for(make_core(CountingRunner()), endpoint, 4)
    outputs = outputs_of(peer)
    assert [[event.token_ids for event in output.events] for output in outputs] == [[[2]], [[3]], [], []]
    assert [output.stats.num_running for output in outputs] == [1, 0, 0, 0]
    assert outputs[0].stats.num_used_blocks == 1
    assert [[report.is_prefill for report in output.reports] for output in outputs] == [[True], [False], [], []]


def test_serve_waits_for_messages_only_when_there_is_nothing_to_do(
    sockets: tuple[EngineEndpoint, socket.socket],
) -> None:
    endpoint, peer = sockets
    peer.sendall(encode_frame(make_request("a", [1, 2], max_new_tokens=2)))
    assert serve_for(make_core(CountingRunner()), endpoint, 4) == [0.01, 0.0, 0.01, 0.01]


class FakeFiles:
    """Adapter files, without any in folders that begin with `/bad`."""

    def __init__(self) -> None:
        self.is_open: dict[int, str] = {}
        self.beat: Callable[[], None] = lambda: None

    def open(self, number: int, folder: str) -> None:
        if folder.startswith("/bad"):
            raise StartError(f"{folder} \ud800")
        self.is_open[number] = folder

    def close(self, number: int) -> None:
        del self.is_open[number]


def with_adapter(name: str, adapter: str, max_new_tokens: int = 2) -> GenerationRequest:
    return msgspec.structs.replace(make_request(name, [1, 2], max_new_tokens=max_new_tokens), adapter_id=adapter)


def test_adapters_come_and_go_between_steps(
    sockets: tuple[EngineEndpoint, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    """Their files are closed once no request has them; whoever names one after that is told, and nobody else ends."""
    endpoint, peer = sockets
    files = FakeFiles()
    core = make_core(CountingRunner(), adapter_files=files)
    open_files = []
    rounds: list[list[Down]] = [
        [LoadAdapter("sql", "/good/sql"), LoadAdapter("x", "/bad"), with_adapter("a", "sql")],
        [UnloadAdapter("sql"), with_adapter("b", "sql", 1), LoadAdapter("y", "/good/y")],
        [with_adapter("c", "sql"), LoadAdapter("y", "/good/z")],
    ]

    def receive(timeout_s: float) -> list[Down]:
        open_files.append([*files.is_open.values()])
        return rounds.pop(0)

    endpoint.receive = receive  # type: ignore[method-assign]
    caplog.set_level("INFO")
    with pytest.raises(IndexError):
        core.serve(endpoint)
    outputs = outputs_of(peer)
    assert open_files == [[], ["/good/sql"], ["/good/y"], ["/good/z"]]
    assert [[reply.error for reply in output.replies] for output in outputs] == [[None, "/bad ?"], [None, None], [None]]
    events = [(event.request_id, event.error) for output in outputs for event in output.events]
    assert events == [("a", None), ("a", None), ("b", None), ("c", UNLOADED_ERROR)]
    assert outputs[-1].stats.num_adapter_loads == 2
    assert [record.getMessage() for record in caplog.records] == [
        "The adapter 'sql' was loaded: there are 1",
        "The adapter 'sql' was unloaded: there are 0",
        "The adapter 'y' was loaded: there are 1",
        "The adapter 'y' was loaded: there are 1",
    ]


@pytest.mark.parametrize("is_reread", [False, True])
def test_an_engine_that_reads_a_large_adapter_is_heard_of_meanwhile(
    sockets: tuple[EngineEndpoint, socket.socket], is_reread: bool
) -> None:
    """Whether it is opened between steps or read once more by one: the HTTP process takes silence for a hang."""
    endpoint, peer = sockets
    files, runner = FakeFiles(), CountingRunner()

    def read_slowly(*_: object) -> StepResult:
        for _part in range(30):
            time.sleep(0.002)
            files.beat()
        return StepResult(torch.zeros(1, VOCAB_SIZE), [])

    message: Down = LoadAdapter("x", "/slow")
    if is_reread:
        message = make_request("a", [1], max_new_tokens=1)
        runner.execute = read_slowly  # type: ignore[method-assign]
    else:
        files.open = read_slowly  # type: ignore[method-assign, assignment]
    peer.sendall(encode_frame(message))
    serve_for(make_core(runner, adapter_files=files), endpoint, 1)
    *beats, output = outputs_of(peer)
    assert 3 <= len(beats) <= 30  # 60 ms, and a beat at most every 10 ms
    assert not any(beat.events or beat.replies or beat.reports for beat in beats)
    assert len(output.events if is_reread else output.replies) == 1


def test_a_step_that_raises_ends_every_request_with_the_error(sockets: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = sockets
    runner = CountingRunner()
    runner.error = RuntimeError("out of registers")
    for name in ("a", "b"):
        peer.sendall(encode_frame(make_request(name, [1, 2])))
    with pytest.raises(RuntimeError, match="out of registers"):
        make_core(runner).serve(endpoint)
    (output,) = outputs_of(peer)
    assert [(event.request_id, event.error) for event in output.events] == [
        ("a", "out of registers"),
        ("b", "out of registers"),
    ]
    assert (output.stats.num_running, output.stats.num_used_blocks) == (0, 0)
    (report,) = output.reports
    assert (report.is_failed, report.is_prefill, report.num_admitted) == (True, True, 2)


def test_an_error_without_a_text_is_told_by_its_name(sockets: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = sockets
    runner = CountingRunner()
    runner.error = MemoryError()
    peer.sendall(encode_frame(make_request("a", [1, 2])))
    with pytest.raises(MemoryError):
        make_core(runner).serve(endpoint)
    assert [event.error for event in outputs_of(peer)[0].events] == ["MemoryError"]


def test_serve_ends_with_the_http_process(sockets: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = sockets
    peer.close()
    with pytest.raises(EOFError):
        make_core(CountingRunner()).serve(endpoint)
