"""Builders of a core out of a fake runner and real parts; apart from `builders`, which load no torch."""

from __future__ import annotations

from pathlib import Path

from engine.core import EngineCore, Runner
from engine.sampling.batch_sampler import BatchSampler
from engine.sampling.grammar import Grammars
from engine.sampling.grammar_torch import apply_masks
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import Sample
from engine.sampling.sampler_torch import sample as sample_in_torch
from engine.scheduling.scheduler import Scheduler
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
) -> EngineCore:
    """A core without step limits; `grammars` left out have no tokenizer, and every grammar is an error."""
    grammars = grammars or Grammars(Path("no tokenizer.json"), 1, [], 1, lambda: apply_masks)
    sampler = BatchSampler(sample, [penalties or Penalties(), grammars])
    return EngineCore(scheduler, runner, sampler, grammars, limit or StepLimit(None, None), UnusedCosts())
