"""The largest step is measured on a device with its own memory, and the plan leaves what it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.build
import engine.start
from engine.attention.base import AttentionShape
from engine.attention.torch import TorchAttention
from engine.core import EngineCore
from engine.device import Device, DeviceMemory
from engine.full_step import full_step, plan_measured
from engine.graphs import GraphLimits, graph_bytes
from engine.limits import EngineLimits, MemoryNeeds, MemoryPlan, NotEnoughMemoryError
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.messages import EngineReady, GenerationRequest
from engine.models.base import CausalLM
from engine.runner import SCORED_ROWS, ModelRunner, StepResult
from engine.start import start_engine
from engine.step_inputs import StepInputs
from tests.unit.test_seams import reference_device

KILOBYTE = 1000
WEIGHTS = 700 * KILOBYTE
PER_TOKEN = 2 * KILOBYTE
PER_ROW = 3 * KILOBYTE
BLOCK_SIZE = 16
BLOCK_BYTES = 2 * 2 * BLOCK_SIZE * 2 * 16 * 4
"""Layers, keys and values, tokens, heads, their size, float32."""
TOKENS = 512
"""The window of the model, and so the step that is measured."""
STEP = TOKENS * PER_TOKEN + 256 * PER_ROW + BLOCK_BYTES


class CountedMemory:
    """A device's memory as a counter: what was freed is kept until it is released."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.kept = 0
        self.limits: list[float] = []

    def take(self, num_bytes: int) -> None:
        if self.used + num_bytes > self.total:
            raise torch.OutOfMemoryError("no memory")
        self.kept -= min(self.kept, num_bytes)
        self.used += num_bytes

    def drop(self, num_bytes: int) -> None:
        self.used -= num_bytes
        self.kept += num_bytes

    def release(self) -> None:
        self.kept = 0

    @property
    def free(self) -> int:
        return self.total - self.used - self.kept

    def device(self) -> Device:
        memory = DeviceMemory(total_bytes=lambda: self.total, release_cached=self.release, set_limit=self.limits.append)
        found: Device = reference_device(
            memory=memory,
            free_memory_bytes=lambda: self.free,
            is_memory_shared=False,
            step_limit_s=None,
            alone_step_limit_s=None,
        )
        return found


@pytest.fixture
def start(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[EngineCore, EngineReady]]:
    """Start an engine whose weights, KV cache and steps take from a counter."""

    def start_with(memory: CountedMemory, **flags: Any) -> tuple[EngineCore, EngineReady]:
        load = engine.build.build_model

        def load_and_count(*arguments: Any) -> CausalLM:
            memory.take(WEIGHTS)
            return load(*arguments)

        class CountingRunner(ModelRunner):
            cache_bytes = 0

            def allocate(self, num_blocks: int, dtype: torch.dtype, *, num_positions: int) -> None:
                memory.drop(self.cache_bytes)
                self.cache_bytes = num_blocks * self.kv_bytes_per_block(dtype)
                memory.take(self.cache_bytes)
                super().allocate(num_blocks, dtype, num_positions=num_positions)

            def run(self, inputs: StepInputs, last_token_ids: torch.Tensor | None = None) -> StepResult:
                num_bytes = len(inputs.input_ids) * PER_TOKEN + len(inputs.logits_indices) * PER_ROW
                memory.take(num_bytes)
                result = super().run(inputs, last_token_ids)
                memory.drop(num_bytes)
                return result

        monkeypatch.setattr(engine.build, "build_model", load_and_count)
        monkeypatch.setattr(engine.start, "ModelRunner", CountingRunner)
        monkeypatch.setattr(engine.start, "detect_device", lambda local_rank, name: memory.device())
        return start_engine(EngineConfig(model_path=str(tiny_model_dir), dtype="float32", **flags))

    return start_with


Start = Callable[..., tuple[EngineCore, EngineReady]]


def test_the_kv_cache_takes_what_a_full_step_leaves(start: Start) -> None:
    memory = CountedMemory(WEIGHTS + STEP + 100 * BLOCK_BYTES)
    core, ready = start(memory)
    assert core.scheduler.stats().num_blocks == 95, "a reserve stays"
    assert ready.max_batch_prefill_tokens == TOKENS
    assert memory.used == WEIGHTS + 95 * BLOCK_BYTES, "nothing of the measured step is left"
    assert memory.limits == []


def test_the_largest_steps_fit_beside_it(start: Start) -> None:
    core, _ = start(CountedMemory(WEIGHTS + STEP + 100 * BLOCK_BYTES))
    for index in range(3):
        core.take(GenerationRequest(request_id=str(index), prompt_token_ids=[5] * 500, max_new_tokens=9))
    while core.scheduler.has_work:
        assert not any(event.error for event in core.step())


def test_no_step_has_more_rows_than_the_measured_one(start: Start) -> None:
    """Without a limit every request that finds a block would run, with a row of logits each."""
    core, _ = start(CountedMemory(WEIGHTS + STEP + 700 * BLOCK_BYTES))
    for index in range(300):
        core.take(GenerationRequest(request_id=str(index), prompt_token_ids=[5], max_new_tokens=3))
    core.step()
    assert core.scheduler.stats().num_running == 256
    while core.scheduler.has_work:
        assert not any(event.error for event in core.step())


def test_drafts_have_rows_in_the_measured_step(start: Start) -> None:
    step = TOKENS * PER_TOKEN + 40 * (1 + 3) * PER_ROW + BLOCK_BYTES
    memory = CountedMemory(WEIGHTS + step + 100 * BLOCK_BYTES)
    core, _ = start(memory, max_draft_tokens=3, max_batch_size=40)
    assert core.scheduler.stats().num_blocks == 95
    whole = TOKENS * PER_TOKEN + TOKENS * PER_ROW + BLOCK_BYTES  # no more than the tokens of the step
    core, _ = start(CountedMemory(WEIGHTS + whole + 100 * BLOCK_BYTES), max_draft_tokens=3)
    assert core.scheduler.stats().num_blocks == 95


def test_graphs_have_their_memory(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "why_no_graphs", lambda self: [])
    sizes = 128, 0, 2
    per_row = 4 * (4 * 64 + 12 * 16 + 3 * 96)
    limits = GraphLimits(sizes=sizes, max_seq_len=TOKENS, num_kv_tokens=95 * BLOCK_SIZE)
    attention = TorchAttention(AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16), BLOCK_SIZE)
    graphs = graph_bytes(limits, attention, activation_bytes_per_row=per_row, max_inputs=96, vocab_size=264)
    memory = CountedMemory(WEIGHTS + STEP + 100 * BLOCK_BYTES + graphs)
    core, _ = start(memory, graph_sizes=sizes)
    assert core.scheduler.stats().num_blocks == 95
    with pytest.raises(StartError, match="--cuda-graphs 1000000: a graph has at most 512 rows: name smaller sizes"):
        start(CountedMemory(memory.total), graph_sizes=(1, 1_000_000))
    core, _ = start(CountedMemory(memory.total), graph_sizes=(0,))
    assert core.scheduler.stats().num_blocks > 95


def test_a_share_of_the_device_is_all_that_is_used(start: Start) -> None:
    """As in TGI: of all its memory, not of what is free."""
    memory = CountedMemory(2 * (WEIGHTS + STEP + 100 * BLOCK_BYTES))
    memory.take(1000 * KILOBYTE)  # another process
    core, _ = start(memory, memory_fraction=0.5)
    assert core.scheduler.stats().num_blocks == 95
    assert memory.limits == [0.5]


def test_a_step_that_does_not_fit_is_halved(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    core, ready = start(CountedMemory(WEIGHTS + STEP - 100 * KILOBYTE))
    assert ready.max_batch_prefill_tokens == TOKENS // 2
    assert "Reducing the max batch prefill from 512 to 256 because there is not enough memory" in caplog.text
    assert core.scheduler.stats().num_blocks > 0


def test_a_step_that_leaves_too_little_for_the_cache_is_halved(start: Start) -> None:
    """A window of 512 tokens takes 32 blocks."""
    memory = CountedMemory(WEIGHTS + STEP + 20 * BLOCK_BYTES)
    _, ready = start(memory, max_total_tokens=512)
    assert ready.max_batch_prefill_tokens == TOKENS // 2
    assert ready.max_batch_total_tokens >= 512


def test_a_step_that_was_asked_for_is_refused_with_one_that_fits(start: Start) -> None:
    total = WEIGHTS + STEP - 100 * KILOBYTE
    with pytest.raises(StartError) as caught:
        start(CountedMemory(total), max_batch_prefill_tokens=TOKENS)
    assert str(caught.value) == (
        "Not enough memory to handle 512 prefill tokens. You need to decrease `--max-batch-prefill-tokens` to 256"
    )
    _, ready = start(CountedMemory(total), max_batch_prefill_tokens=256)
    assert ready.max_batch_prefill_tokens == 256


def test_a_cache_that_no_step_leaves_room_for_is_refused_with_one_that_fits(start: Start) -> None:
    total = WEIGHTS + STEP + 40 * BLOCK_BYTES
    with pytest.raises(StartError, match=r"to handle `max_batch_total_tokens=100000`: .* lower --max-batch-") as caught:
        start(CountedMemory(total), max_batch_total_tokens=100_000)
    fitting = int(str(caught.value).rpartition(" ")[2])
    _, ready = start(CountedMemory(total), max_batch_total_tokens=fitting)
    assert ready.max_batch_prefill_tokens == TOKENS


def test_weights_that_are_larger_than_they_seemed(start: Start) -> None:
    with pytest.raises(StartError, match=r"^Not enough memory for the model: its weights take more than there is"):
        start(CountedMemory(WEIGHTS - 1))


def test_memory_that_is_gone_when_the_cache_wants_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CountedMemory(WEIGHTS + STEP + 100 * BLOCK_BYTES)

    def plan_and_take(*arguments: Any, **options: Any) -> MemoryPlan:
        plan = plan_measured(*arguments, **options)
        memory.take(STEP + 50 * BLOCK_BYTES)
        return plan

    monkeypatch.setattr(engine.start, "plan_measured", plan_and_take)
    with pytest.raises(StartError, match=r"^Not enough memory for a KV cache of 1520 tokens, although it was free"):
        start(memory)


@pytest.mark.parametrize(
    ("num_tokens", "starts"), [(10, [0, 10]), (100, [0, 100]), (250, [0, 100, 200, 250]), (200, [0, 100, 200])]
)
def test_a_full_step_has_long_contexts_and_everything_that_a_step_may_have(num_tokens: int, starts: list[int]) -> None:
    inputs = full_step(num_tokens, num_positions=100, max_rows=80, block_size=16)
    assert inputs.query_start_loc == starts
    assert inputs.seq_lens == inputs.prompt_lens == [100] * (len(starts) - 1)
    assert len(inputs.input_ids) == num_tokens
    assert len(inputs.logits_indices) == min(80, num_tokens)
    assert len(inputs.scored_indices) == len(inputs.scored_token_ids) == min(SCORED_ROWS, num_tokens)
    assert inputs.block_table == bytes(4 * 7 * (len(starts) - 1))


NEEDS = MemoryNeeds(weights=0, per_block=1, per_step_token=1, block_size=16)


def plan_with(free_bytes: int, measure: Callable[[int], int], *, is_alone: bool) -> list[int]:
    """The sizes of the steps that were planned for; the memory is enough for all that are measured."""
    planned: list[int] = []

    def plan(num_tokens: int, step_bytes: int) -> MemoryPlan:
        planned.append(num_tokens)
        return MemoryPlan(
            1,
            EngineLimits(max_input_tokens=1, max_total_tokens=2, max_batch_prefill_tokens=1, max_batch_total_tokens=2),
        )

    plan_measured(EngineConfig(model_path="m"), 4096, NEEDS, free_bytes, measure=measure, plan=plan, is_alone=is_alone)
    return planned


def out_of_memory(num_tokens: int) -> int:
    raise torch.OutOfMemoryError("no memory")


def test_ranks_take_the_same_step_although_one_of_them_has_less() -> None:
    """By the estimate for the tightest rank: none of them tries a step in which it could leave the others waiting."""
    measured: list[int] = []

    def measure(num_tokens: int) -> int:
        measured.append(num_tokens)
        return 1

    assert plan_with(1500, measure, is_alone=False) == measured == [1024]


def test_a_rank_that_runs_out_of_memory_in_a_step_of_all_ends_the_start() -> None:
    with pytest.raises(StartError, match=r"^Not enough memory to handle 4096 prefill tokens\. .* to 2048$"):
        plan_with(10**6, out_of_memory, is_alone=False)


@pytest.mark.parametrize("free_bytes", [1, 10**6])
def test_no_step_fits(free_bytes: int) -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"^Not enough memory for a step beside the weights: raise"):
        plan_with(free_bytes, out_of_memory, is_alone=True)
