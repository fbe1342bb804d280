"""EngineCore: the step, and the loop around it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import torch

from engine.link.ipc import EngineEndpoint
from engine.link.messages import AbortRequest, Down, Goodbye, SamplingParams, StepOutput, StepReport, TokenEvent
from engine.runner import StepResult
from engine.sampling.grammar import Grammars
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import RawRows, Sample
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_costs import StepCosts
from engine.scheduling.step_limit import StepLimit

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


class Runner(Protocol):
    """What the core needs of `engine.runner.ModelRunner`."""

    def execute(self, batch: ScheduledBatch) -> StepResult: ...


class EngineCore:
    """Schedule, run, sample, update; and the requests that come and go between steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sample: Sample,
        limit: StepLimit,
        costs: StepCosts | None = None,
        penalties: Penalties | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`costs`: what the scheduler's speculation goes by, kept true here.

        `grammars`: without them no request may have one.
        """
        self._costs = costs
        self._penalties = penalties or Penalties()
        self.grammars = grammars
        self.scheduler = scheduler
        self._runner = runner
        self._sample = sample
        self._limit = limit
        self.report = StepReport()
        """Of the last step."""
        self.is_dismissed = False
        """The HTTP process has said that it ends in good order."""

    def step(self) -> list[TokenEvent]:
        """Compute one step; the events are new tokens and ends of requests."""
        report = self.report = StepReport()
        num_admissions = self.scheduler.num_admissions
        started = time.monotonic()
        batch = self.scheduler.schedule(self._limit.max_tokens(is_only_sequence=self.scheduler.num_sequences == 1))
        scheduled = time.monotonic()
        is_decoding = all(scheduled.num_tokens == 1 for scheduled in batch.scheduled)
        report.num_sequences = len(batch.scheduled)
        report.num_admitted = self.scheduler.num_admissions - num_admissions
        report.is_prefill = not is_decoding or report.num_admitted > 0
        result = self._runner.execute(batch)
        sampling: list[SamplingParams] = []
        positions: list[int] = []
        for part in batch.scheduled:
            first = part.sequence.num_output_tokens
            sampling += [part.sequence.request.sampling] * len(part.rows)
            positions += range(first, first + len(part.rows))
        raw = self._adjust(batch, result.logits, sampling)
        sampled = self._sample(result.logits, sampling, positions, raw)
        sampled_at = time.monotonic()
        events = self.scheduler.update(batch, sampled, result.prompt_logprobs)
        ended = time.monotonic()
        seconds = ended - started
        report.total_s, report.schedule_s = seconds, scheduled - started
        report.forward_s, report.update_s = sampled_at - scheduled, ended - sampled_at
        report.num_draft_hits = [len(event.token_ids) - 1 for event in events if event.token_ids]
        self._limit.observe(batch.num_tokens, seconds)
        if self._costs is not None and is_decoding:
            self._costs.observe(batch.num_tokens, seconds)
        return events

    def _adjust(self, batch: ScheduledBatch, logits: torch.Tensor, params: Sequence[SamplingParams]) -> RawRows | None:
        """Change logits [rows, vocab] in place as the requests want it; what they were, where logprobs are of that."""
        penalized, held = self._penalties.rows(batch), Grammars.rows(batch)
        raw = RawRows.of(logits, {*penalized, *held}, params)
        if penalized:
            self._penalties.apply(batch, logits)
        if held:
            assert self.grammars is not None
            self.grammars.mask(batch, logits)
        return raw

    def take(self, message: Down) -> None:
        """A request, an abort or a goodbye, between steps."""
        if isinstance(message, AbortRequest):
            self.scheduler.abort(message.request_id)
            if self.grammars is not None:
                self.grammars.abort(message.request_id)
        elif isinstance(message, Goodbye):
            self.is_dismissed = True
        elif message.grammar is not None:
            assert self.grammars is not None
            self.grammars.compile(message)
        else:
            self.scheduler.add(message)

    def take_compiled(self) -> list[TokenEvent]:
        """Let the requests go on whose grammars are ready; the events are the ends of those that have none."""
        events = []
        for compiled in self.grammars.take_compiled() if self.grammars is not None else []:
            if compiled.error is not None:
                events.append(TokenEvent(request_id=compiled.request.request_id, error=compiled.error))
            else:
                self.scheduler.add(compiled.request, grammar=compiled.grammar, arrival_time=compiled.arrival_time)
        return events

    def fail_all(self, error: str) -> list[TokenEvent]:
        """End every request with `error`, those whose grammars are not ready, too."""
        request_ids = self.grammars.abort_all() if self.grammars is not None else []
        return self.scheduler.fail_all(error) + [TokenEvent(request_id=name, error=error) for name in request_ids]

    def serve(self, endpoint: EngineEndpoint, check: Callable[[], None] = lambda: None) -> NoReturn:
        """Serve until the HTTP process is gone: raises EOFError then. `check` raises when serving must end.

        A step that raises ends every open request with the error, and then this process: its state is not known.
        """
        if self.grammars is not None:
            self.grammars.on_compiled = endpoint.wake
        while True:
            for message in endpoint.receive(0.0 if self.scheduler.has_work else HEARTBEAT_S):
                self.take(message)
            events = self.take_compiled()
            reports: list[StepReport] = []
            check()
            if self.scheduler.has_work:
                try:
                    events += self.step()
                    reports = [self.report] if self.report.num_sequences else []
                except Exception as error:
                    events += self.fail_all(str(error) or type(error).__name__)
                    self.report.is_failed = True
                    endpoint.send(StepOutput(events=events, stats=self.scheduler.stats(), reports=[self.report]))
                    raise
            endpoint.send(StepOutput(events=events, stats=self.scheduler.stats(), reports=reports))
