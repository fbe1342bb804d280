"""EngineCore: the step, and the loop around it."""

from __future__ import annotations

import logging
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


class Runner(Protocol):
    """Computes a step: `engine.runner.ModelRunner`, or rank 0's, which lets the other ranks compute it, too."""

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """The logits of the batch's rows, and the logprobs of its scored tokens."""


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
    ) -> None:
        """`grammars` are compiled here and are among the sampler's processors.

        `limit` and `costs`, which the scheduler's speculation goes by, are kept true here.
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
        self.open_adapter: Callable[[int, str], None] = lambda number, folder: None
        """Opens the files of the adapter that will have that number; raises StartError for one that can't be had."""
        self.replies: list[AdapterReply] = []
        """The replies that wait to be sent."""
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
        elif message.grammar is not None:
            self.grammars.compile(message)
        else:
            self.scheduler.add(message)

    def _change_adapters(self, message: LoadAdapter | UnloadAdapter) -> AdapterReply:
        adapters = self.scheduler.adapters
        if isinstance(message, UnloadAdapter):
            adapters.retire(message.name)
            return AdapterReply(message.name)
        try:
            self.open_adapter(adapters.next_number, message.path)
        except StartError as error:
            return AdapterReply(message.name, str(error))
        adapters.add(message.name, message.path)
        logger.info("Adapter %s loaded from %s", message.name, message.path)
        return AdapterReply(message.name)

    def take_compiled(self) -> list[TokenEvent]:
        """Schedule the requests whose grammars are ready; the events end those whose grammars cannot be compiled."""
        events = []
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

    def serve(self, endpoint: EngineEndpoint, check: Callable[[], None] = lambda: None) -> NoReturn:
        """Serve until the HTTP process is gone: raises EOFError then. `check` raises when serving must end.

        A step that raises ends every open request with the error, and then this process: its state is not known.
        """
        self.grammars.on_compiled = endpoint.wake
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
            if events or reports or self.replies or not self.has_work:
                replies, self.replies = self.replies, []
                stats = self.scheduler.stats()
                endpoint.send(StepOutput(events=events, stats=stats, reports=reports, replies=replies))
