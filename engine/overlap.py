"""Steps that overlap: the next one is launched before the last one's tokens are read, so that the device never waits.

A sequence's new token is on the device then, and the host doesn't know it yet: the next step takes it there. Who needs
it on the host first, such as a grammar, leaves out a step; others go on. That a sequence has ended is seen one step
late: what was computed for it in vain is dropped.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from engine.core import AdapterFiles, EngineCore
from engine.device import Device
from engine.link.config import EngineConfig
from engine.link.messages import StepReport, TokenEvent
from engine.link.registry import import_entry
from engine.runner import StepResult
from engine.sampling.batch_sampler import BatchSampler, LaunchingBatchSampler
from engine.sampling.grammar import Grammars
from engine.sampling.sampler import LAUNCHED_SAMPLERS, LaunchSample, PendingTokens
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_clock import StepClock
from engine.scheduling.step_costs import CostObserver
from engine.scheduling.step_limit import StepLimit
from quant.kernels.transfer import HostCopy


def why_not_overlap(config: EngineConfig, device: Device) -> list[str]:
    """Reasons why steps don't overlap; empty if they do."""
    reasons = []
    if config.is_overlap_disabled:
        reasons.append("--disable-overlap")
    if not device.is_asynchronous:
        reasons.append("the device computes while it is called")
    if device.sampler not in LAUNCHED_SAMPLERS:
        reasons.append("its sampler reads the tokens at once")
    if config.max_draft_tokens:
        reasons.append("speculation drafts on the host")
    return reasons


def describe_overlap(reasons: list[str]) -> str:
    """A line for the summary of the start."""
    if reasons:
        return f"Steps don't overlap: {'; '.join(reasons)}"
    return "Steps overlap: each is launched before the tokens of the last one are read"


class OverlappedRunner(Protocol):
    """Launches a step whose input tokens may be on the device only: `engine.runner.ModelRunner`, or a
    `Leader` of several ranks."""

    def execute(self, batch: ScheduledBatch, last_token_ids: torch.Tensor | None = None) -> StepResult:
        """As `engine.core.Runner`; `last_token_ids` [rows] are those of the step before."""


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that the device may still be computing."""

    batch: ScheduledBatch
    clock: StepClock
    tokens: PendingTokens
    scores: HostCopy


class OverlappedCore(EngineCore):
    """An `EngineCore` whose steps overlap: each launches one step and finishes the one before."""

    runner: OverlappedRunner
    sampler: LaunchingBatchSampler

    def __init__(
        self,
        scheduler: Scheduler,
        runner: OverlappedRunner,
        sampler: LaunchingBatchSampler,
        grammars: Grammars,
        limit: StepLimit,
        costs: CostObserver,
        adapter_files: AdapterFiles | None = None,
    ) -> None:
        """As `EngineCore`; the scheduler drafts nothing and knows from the sampler who needs tokens."""
        super().__init__(scheduler, runner, sampler, grammars, limit, costs, adapter_files)
        self._launched: LaunchedStep | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._launched is not None

    def step(self) -> list[TokenEvent]:
        """Launch a step, if anyone can go on, and finish the one before, if there is one: the events are its."""
        last = self._launched
        clock = StepClock(None if last is None else last.clock)
        self.report = clock.report
        batch = self.scheduler.schedule(self._room())
        clock.end_scheduling()
        try:
            self._launched = self._launch(batch, clock, last) if batch.scheduled else None
        except torch.OutOfMemoryError as error:
            if last is None:
                self.report.is_failed = True
                return self.shedder.shed(batch, error)
            self._launched = None  # it is scheduled again once the last step has given its memory back
        if last is None:
            self.report = StepReport()
            return []
        return self._finish(last)

    def _launch(self, batch: ScheduledBatch, clock: StepClock, last: LaunchedStep | None) -> LaunchedStep:
        clock.begin_computing(batch)
        result = self.runner.execute(batch, None if last is None else last.tokens.token_ids)
        tokens = self.sampler.launch(batch, result.logits)
        scores = result.copy_scores()
        self.scheduler.advance(batch)
        return LaunchedStep(batch, clock, tokens, scores)

    def _finish(self, step: LaunchedStep) -> list[TokenEvent]:
        """Wait for a step's tokens, and take them in."""
        self.report = step.clock.report
        sampled = step.tokens.read()
        step.clock.end_computing()
        self.shedder.note_success()
        events = self.scheduler.update(step.batch, sampled, step.scores.read().tolist())
        step.clock.end_updating()
        self._learn(step.batch, step.clock.finish(events))
        return events


def make_core(
    device: Device,
    scheduler: Scheduler,
    runner: OverlappedRunner,
    sampler: BatchSampler,
    grammars: Grammars,
    limit: StepLimit,
    costs: CostObserver,
    adapter_files: AdapterFiles | None = None,
    *,
    is_overlapped: bool,
) -> EngineCore:
    """A core with steps that overlap, where there is no reason against it, or with steps one after the other."""
    if not is_overlapped:
        return EngineCore(scheduler, runner, sampler, grammars, limit, costs, adapter_files)
    launch_sample: LaunchSample = import_entry(LAUNCHED_SAMPLERS, device.sampler, "sampler")
    launching = sampler.launching(launch_sample)
    return OverlappedCore(scheduler, runner, launching, grammars, limit, costs, adapter_files)
