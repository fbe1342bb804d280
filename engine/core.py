"""EngineCore: the step, and the loop around it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

import torch

from engine.link.errors import StartError
from engine.link.ipc import EngineEndpoint
from engine.link.messages import (
    AbortRequest,
    AdapterReply,
    Down,
    Goodbye,
    LoadAdapter,
    StepOutput,
    StepReport,
    TokenEvent,
    UnloadAdapter,
)
from engine.runner import StepResult
from engine.sampling.batch_sampler import BatchSampler
from engine.sampling.grammar import Grammars
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_clock import StepClock
from engine.scheduling.step_costs import CostObserver
from engine.scheduling.step_limit import StepLimit, StepRoom
from engine.shedding import Shedder

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
UNLOADED_ERROR = "the request's adapter was unloaded before it came"


class Runner(Protocol):
    """Computes a step: `engine.runner.ModelRunner`, or rank 0's, which lets the other ranks compute it, too."""

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """The logits of the batch's rows, and the logprobs of its scored tokens."""


class AdapterFiles(Protocol):
    """The open files of adapters: `engine.adapters.AdapterSlots`, or rank 0's, which has the other ranks follow."""

    beat: Callable[[], None]
    """Called again and again while files are read, also by a step that reads one once more."""

    def open(self, number: int, folder: str) -> None:
        """Open those of the adapter that will have that number. Raises StartError for one that can't be had."""

    def close(self, number: int) -> None:
        """Close those of an adapter that no step will name any more."""


class EngineCore:
    """Schedule, run, sample, update; and the requests that come and go between steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sampler: BatchSampler,
        grammars: Grammars,
        limit: StepLimit,
        costs: CostObserver,
        adapter_files: AdapterFiles | None = None,
    ) -> None:
        """`grammars` are compiled here and are among the sampler's processors.

        `limit` and `costs`, which the scheduler's speculation goes by, are kept true here. `adapter_files` None: no
        adapter comes or goes.
        """
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.grammars = grammars
        self.limit = limit
        self.costs = costs
        self.shedder = Shedder(scheduler)
        self.report = StepReport()
        """The report of the last step."""
        self._adapter_files = adapter_files
        self.replies: list[AdapterReply] = []
        """The replies that wait to be sent."""
        self._refused: list[TokenEvent] = []
        """The ends, which wait to be sent, of requests that came too late."""
        self._last_beat = 0.0
        self.is_dismissed = False
        """The HTTP process has said that it ends in good order."""

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[TokenEvent]:
        """Compute one step; the events are new tokens and ends of requests."""
        clock = StepClock()
        self.report = clock.report
        batch = self.scheduler.schedule(self._room())
        clock.end_scheduling()
        clock.begin_computing(batch)
        try:
            result = self.runner.execute(batch)
            sampled = self.sampler.sample(batch, result.logits)
        except torch.OutOfMemoryError as error:
            self.report.is_failed = True
            return self.shedder.shed(batch, error)
        clock.end_computing()
        self.shedder.note_success()
        scores = result.copy_scores().read().tolist() if result.scores else ()
        events = self.scheduler.update(batch, sampled, scores)
        clock.end_updating()
        self._learn(batch, clock.finish(events))
        return events

    def _room(self) -> StepRoom:
        """The next step's room for prompts, so that it ends in time."""
        return self.limit.room(is_only_sequence=self.scheduler.num_sequences == 1)

    def _learn(self, batch: ScheduledBatch, seconds: float) -> None:
        self.limit.observe(batch, seconds)
        if batch.is_decoding:
            self.costs.observe(batch.num_tokens, seconds)

    def take(self, message: Down) -> None:
        """Take in a request, an abort or a goodbye, between steps."""
        if isinstance(message, AbortRequest):
            self.scheduler.abort(message.request_id)
            self.grammars.abort(message.request_id)
        elif isinstance(message, Goodbye):
            self.is_dismissed = True
        elif isinstance(message, LoadAdapter | UnloadAdapter):
            self.replies.append(self._change_adapters(message))
        elif message.adapter_id is not None and message.adapter_id not in self.scheduler.adapters:
            self._refused.append(TokenEvent(request_id=message.request_id, error=UNLOADED_ERROR))
        elif message.grammar is not None:
            self.grammars.compile(message)
        else:
            self.scheduler.add(message)

    def _change_adapters(self, message: LoadAdapter | UnloadAdapter) -> AdapterReply:
        adapters = self.scheduler.adapters
        if isinstance(message, UnloadAdapter):
            adapters.retire(message.name)
            logger.info("The adapter %r was unloaded: there are %d", message.name, adapters.num_adapters)
            return AdapterReply()
        assert self._adapter_files is not None
        try:
            self._adapter_files.open(adapters.next_number, message.path)
        except StartError as error:
            return AdapterReply(str(error).encode(errors="replace").decode())  # texts of files may not be Unicode
        adapters.add(message.name)
        logger.info("The adapter %r was loaded: there are %d", message.name, adapters.num_adapters)
        return AdapterReply()

    def close_unused_adapters(self) -> None:
        """Close the files of adapters that were unloaded or replaced, once no request has them."""
        scheduler = self.scheduler
        if self._adapter_files is not None and scheduler.adapters.has_retired:
            users = {sequence.adapter for sequence in (*scheduler.running, *scheduler.waiting)}
            for number in scheduler.adapters.forget_unused(users, self.grammars.adapter_names):
                self._adapter_files.close(number)

    def take_compiled(self) -> list[TokenEvent]:
        """Schedule the requests whose grammars are ready; the events end those that can't run.

        Those are requests whose grammars can't be compiled, and whose adapters were unloaded before they came.
        """
        events, self._refused = self._refused, []
        for compiled in self.grammars.take_compiled():
            if compiled.error is not None:
                events.append(TokenEvent(request_id=compiled.request.request_id, error=compiled.error))
            else:
                self.scheduler.add(compiled.request, grammar=compiled.grammar, arrival_time=compiled.arrival_time)
        return events

    def fail_all(self, error: str) -> list[TokenEvent]:
        """End every request with `error`, also those whose grammars are not ready."""
        compiling = self.grammars.abort_all()
        return self.scheduler.fail_all(error) + [TokenEvent(request_id=name, error=error) for name in compiling]

    def _beat(self, endpoint: EngineEndpoint) -> None:
        """Send a sign of life from within a step, or between two, unless there was one lately."""
        now = time.monotonic()
        if now - self._last_beat >= HEARTBEAT_S:
            self._last_beat = now
            endpoint.send(StepOutput(events=[], stats=self.scheduler.stats()))

    def serve(self, endpoint: EngineEndpoint, check: Callable[[], None] = lambda: None) -> NoReturn:
        """Serve until the HTTP process is gone: raises EOFError then. `check` raises when serving must end.

        A step that raises ends every open request with the error, and then this process: its state is not known.
        """
        self.grammars.on_compiled = endpoint.wake
        if self._adapter_files is not None:
            self._adapter_files.beat = lambda: self._beat(endpoint)
        while True:
            for message in endpoint.receive(0.0 if self.has_work else HEARTBEAT_S):
                self.take(message)
            events = self.take_compiled()
            reports: list[StepReport] = []
            check()
            if self.has_work:
                try:
                    events += self.step()
                    reports = [self.report] if self.report.num_sequences else []
                except Exception as error:
                    events += self.fail_all(str(error) or type(error).__name__)
                    self.report.is_failed = True
                    endpoint.send(StepOutput(events=events, stats=self.scheduler.stats(), reports=[self.report]))
                    raise
            self.close_unused_adapters()
            if events or reports or self.replies or not self.has_work:
                replies, self.replies = self.replies, []
                stats = self.scheduler.stats()
                endpoint.send(StepOutput(events=events, stats=stats, reports=reports, replies=replies))
