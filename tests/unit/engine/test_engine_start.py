"""What the engine learns before it serves; whole starts are in tests/contract/test_loading.py."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine.device import Device, find_cpu
from engine.link.config import EngineConfig
from engine.link.progress import StartProgress
from engine.runner import ModelRunner, StepResult
from engine.sampling.sampler_torch import sample
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.step_limit import StepLimit
from engine.start import _written_caches, make_step_limit
from engine.warm_up import warm_up

SECONDS_PER_TOKEN = 0.001


class SleepingRunner:
    """A step takes a millisecond per token; the very first one also compiles."""

    def __init__(self) -> None:
        self.num_steps = 0

    def execute(self, batch: ScheduledBatch) -> StepResult:
        self.num_steps += 1
        time.sleep(batch.num_tokens * SECONDS_PER_TOKEN + (0.3 if self.num_steps == 1 else 0.0))
        return StepResult(torch.zeros(1, 8), [])


GPU = dataclasses.replace(find_cpu(0), step_limit_s=None, alone_step_limit_s=None, spares_streams=False)


@pytest.mark.parametrize(
    ("device", "target_s", "line"),
    [
        (find_cpu(0), None, "0.25 s"),
        (find_cpu(0), 0.1, "0.1 s"),
        (find_cpu(0), 0.0, None),
        (GPU, None, None),
        (GPU, 0.1, "0.1 s"),
    ],
)
def test_steps_are_as_long_as_the_flag_says_or_the_device(
    device: Device, target_s: float | None, line: str | None
) -> None:
    config = EngineConfig(model_path="", target_inter_token_latency_s=target_s)
    described = make_step_limit(config, device).describe()
    assert described is line if line is None else f" {line} at most" in str(described)
    is_sparing = device is not GPU and target_s is None
    assert ("times what they take without prompts" in str(described)) == is_sparing


def test_warm_up_teaches_the_step_limit_what_a_token_of_a_prompt_costs() -> None:
    limit = StepLimit(1.0, 5.0)
    warm_up(cast(ModelRunner, cast(Any, SleepingRunner())), sample, limit, 64, block_size=16, progress=StartProgress())
    room = limit.room(is_only_sequence=False)
    room.begin([], [])
    # Neither the compiling step (5 ms a token) nor the step of one token (0.02 ms a token if taken for 64).
    assert 300 < room.num_fitting(10_000, 0, 1.0) <= 1000


@pytest.mark.parametrize("num_threads", [1, 3, 8])
def test_all_memory_of_the_caches_is_written_before_the_engine_is_ready(num_threads: int) -> None:
    tensors = [torch.full((5,), torch.nan) for _ in range(4)]
    prepared = SimpleNamespace(
        device=find_cpu(0),
        runner=SimpleNamespace(cache_tensors=tensors),
        config=EngineConfig(model_path="", num_threads=num_threads),
    )
    with _written_caches(cast(Any, prepared)):
        pass
    assert not any(tensor.any() for tensor in tensors)
