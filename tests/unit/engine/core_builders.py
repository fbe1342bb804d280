"""Builders of a core out of a fake runner and real parts; apart from `builders`, which load no torch."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from engine.core import AdapterFiles, EngineCore, Runner
from engine.overlap import OverlappedCore, OverlappedRunner
from engine.sampling.bans import Bans
from engine.sampling.batch_sampler import BatchSampler, LaunchingBatchSampler, LogitsProcessor
from engine.sampling.grammar import Grammars
from engine.sampling.grammar_torch import apply_masks
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import LaunchSample, Sample
from engine.sampling.sampler_torch import sample as sample_in_torch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_costs import UnusedCosts
from engine.scheduling.step_limit import StepLimit


def assemble_core(
    scheduler: Scheduler,
    runner: Runner,
    *,
    sample: Sample = sample_in_torch,
    limit: StepLimit | None = None,
    penalties: Penalties | None = None,
    grammars: Grammars | None = None,
    launch_sample: LaunchSample | None = None,
    adapter_files: AdapterFiles | None = None,
) -> EngineCore:
    """A core without step limits; `grammars` left out have no tokenizer, and every grammar is an error.

    With `launch_sample` steps overlap: the scheduler needs `needs_tokens`, the runner is an `OverlappedRunner`.
    """
    grammars = grammars or Grammars(Path("no tokenizer.json"), 1, [], 1, lambda: apply_masks)
    processors: list[LogitsProcessor] = [penalties or Penalties(), Bans([*scheduler.eos_token_ids]), grammars]
    limit, costs = limit or StepLimit(None, None), UnusedCosts()
    if launch_sample is None:
        return EngineCore(scheduler, runner, BatchSampler(sample, processors), grammars, limit, costs, adapter_files)
    sampler = LaunchingBatchSampler(sample, processors, launch_sample)
    overlapped_runner = cast(OverlappedRunner, runner)
    return OverlappedCore(scheduler, overlapped_runner, sampler, grammars, limit, costs, adapter_files)


def needs_tokens(sequence: Sequence) -> bool:
    """As the processors above say."""
    return any(processor.needs_tokens(sequence) for processor in (Penalties, Bans, Grammars))
