"""The host's part of an engine's steps as one side of a comparison: speaks JSON lines as `sides.Side` expects.

    PYTHONPATH=CHECKOUT python side_host_step.py

The engine comes from PYTHONPATH. Its model computes nothing and its sampler gives every row the same token, so that no
weights are needed and the processor's time is that of the parts around them.
"""

from __future__ import annotations

import functools
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.attention.base import AttentionShape
from engine.core import EngineCore
from engine.device import find_cpu
from engine.link.ipc import EngineEndpoint
from engine.link.messages import GenerationRequest, SamplingParams, StepOutput
from engine.runner import ModelRunner
from engine.sampling.batch_sampler import BatchSampler
from engine.sampling.grammar import Grammars
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import RawRows
from engine.scheduling.batch import SampledBatch
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_costs import UnusedCosts
from engine.scheduling.step_limit import StepLimit

SHAPE = AttentionShape(num_heads=28, num_kv_heads=4, head_dim=128)
VOCAB_SIZE = 8
TOKEN_ID = 5
MAX_STEPS = 4096
"""Steps for which there is memory."""


class IdleModel:
    """Stands for a model: knows its shape and computes nothing."""

    num_layers = 1
    attention_shape = SHAPE

    def __init__(self) -> None:
        self.rotary = self
        self._logits = torch.zeros(0, VOCAB_SIZE)

    def prepare(self, *args: object) -> None:
        pass

    def forward(self, input_ids: torch.Tensor, *args: object) -> torch.Tensor:
        if len(input_ids) != len(self._logits):
            self._logits = torch.zeros(len(input_ids), VOCAB_SIZE)
        return self._logits

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def idle_sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], raw: RawRows | None = None
) -> SampledBatch:
    """The same token for every row."""
    num_rows = len(params)
    return SampledBatch([TOKEN_ID] * num_rows, [-1.0] * num_rows, [True] * num_rows)


def make_core(
    scheduler: Scheduler, runner: ModelRunner, grammars: Grammars, *, is_overlapped: bool
) -> tuple[EngineCore, str]:
    """A core, and the name of its sampler's method."""
    processors: list[Any] = [Penalties(), grammars]
    rest = grammars, StepLimit(None, None), UnusedCosts()
    if not is_overlapped:
        return EngineCore(scheduler, runner, BatchSampler(idle_sample, processors), *rest), "sample"
    # A checkout from before steps could overlap lacks these.
    from engine.overlap import OverlappedCore
    from engine.sampling.batch_sampler import LaunchingBatchSampler
    from engine.sampling.sampler import FinishedTokens

    def idle_launch(
        logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], raw: RawRows | None = None
    ) -> FinishedTokens:
        batch = idle_sample(logits, params, positions, raw)
        return FinishedTokens(torch.full((len(batch.token_ids),), TOKEN_ID, dtype=torch.int32), batch)

    return OverlappedCore(
        scheduler, runner, LaunchingBatchSampler(idle_sample, processors, idle_launch), *rest
    ), "launch"


class Timer:
    """The processor's time in calls, by the name of the part."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        seconds = self.seconds.setdefault(part, [])

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            started = time.thread_time()
            result = function(*args)
            seconds.append(time.thread_time() - started)
            return result

        return call

    def clear(self) -> None:
        for seconds in self.seconds.values():
            seconds.clear()


class Engine:
    """An engine in which `num_sequences` sequences of about `context` tokens decode, and a reader of its events."""

    def __init__(self, num_sequences: int, context: int, *, is_overlapped: bool) -> None:
        runner = ModelRunner(IdleModel(), find_cpu(0))  # type: ignore[arg-type]
        num_blocks = num_sequences * (-(-(context + MAX_STEPS) // runner.block_size) + 2)
        scheduler = Scheduler(
            BlockManager(num_blocks, runner.block_size), max_batch_tokens=num_sequences * context, eos_token_ids=[]
        )
        grammars = Grammars(Path("none"), VOCAB_SIZE, [], 1, lambda: lambda *args: None)
        self._core, sampling = make_core(scheduler, runner, grammars, is_overlapped=is_overlapped)
        self._reader, engine_end = socket.socketpair()
        self._reader.setblocking(False)
        self._endpoint = EngineEndpoint(engine_end)
        for index in range(num_sequences):
            # Lengths differ, so that as in a server only some of the sequences begin a block in a step.
            prompt = [index, *[3] * (context - 1 - index % runner.block_size)]
            scheduler.add(
                GenerationRequest(request_id=f"request-{index}", prompt_token_ids=prompt, max_new_tokens=1 << 30)
            )
        batch = scheduler.schedule()
        scheduler.update(batch, idle_sample(torch.empty(0), [SamplingParams()] * batch.num_rows, []))
        self._timer = Timer()
        self._time(scheduler, runner, sampling)

    def _time(self, scheduler: Scheduler, runner: ModelRunner, sampling: str) -> None:
        timed = self._timer.timed
        for part, owner, name in [
            ("schedule", scheduler, "schedule"),
            ("inputs", runner, "inputs"),
            ("buffers", runner, "run"),
            ("sampling", self._core.sampler, sampling),
            ("update", scheduler, "update"),
            ("publish", self._endpoint, "send"),
            ("step", self, "_step"),
        ]:
            setattr(owner, name, timed(part, getattr(owner, name)))

    def _step(self) -> None:
        """As `EngineCore.serve` does."""
        events = self._core.step()
        self._endpoint.send(StepOutput(events=events, stats=self._core.scheduler.stats(), reports=[self._core.report]))

    def milliseconds(self, num_steps: int) -> dict[str, float]:
        """The median of each part."""
        self._timer.clear()
        for _ in range(num_steps):
            self._step()
            self._drain()
        return {part: 1000 * statistics.median(values) for part, values in self._timer.seconds.items()}

    def _drain(self) -> None:
        try:
            while self._reader.recv(1 << 20):
                pass
        except BlockingIOError:
            pass


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({"engine": str(Path(sys.modules["engine"].__path__[0]).parent)}), flush=True)
    sizes, engine = None, None
    for line in sys.stdin:
        message = json.loads(line)
        spec = message["num_sequences"], message["context"], message["is_overlapped"]
        if engine is None or sizes != spec:
            sizes, engine = spec, None
            engine = Engine(*spec[:2], is_overlapped=spec[2])
            engine.milliseconds(message["num_steps"])  # warms up
        print(json.dumps(engine.milliseconds(message["num_steps"])), flush=True)


if __name__ == "__main__":
    main()
