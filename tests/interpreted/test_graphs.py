"""Graphs of steps on the device `interpreted`, whose stand-in freezes what a graph does: ids and bits stay the same.

Rows of padding and everything that a step doesn't write hold NaN there, which must not reach any other row.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.attention.base import LayerCache
from engine.attention.triton import TritonAttention
from engine.graphs import GraphLimits, StepGraphs
from engine.runner import ModelRunner
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.ngram import Proposal
from engine.scheduling.sequence import Sequence
from engine.scheduling.speculate import Speculator
from engine.scheduling.step_costs import StepCosts
from tests.contract.harness import make_runner, make_sequence, random_ids
from tests.interpreted.test_engine import (
    CHECKPOINTS,
    MAX_NEW_TOKENS,
    NUM_BLOCKS,
    PLAIN,
    core_of,
    expected_ids,
    interpreted,
    make_prompts,
    make_quantized_runner,
    run,
)
from tests.tiny_model import write_tiny_qwen2_moe

BLOCK_SIZE = 16
LIMITS = GraphLimits(sizes=(1, 4, 8), max_seq_len=NUM_BLOCKS * BLOCK_SIZE, num_kv_tokens=NUM_BLOCKS * BLOCK_SIZE)
FEW = dataclasses.replace(LIMITS, sizes=(2,))
"""One graph, where which one is taken is not the question: each one is run when it is captured."""


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that a graph has computed."""
    rows: list[int] = []
    run_graph = StepGraphs.run

    def counted(graphs: StepGraphs, *args: object) -> torch.Tensor | None:
        logits = run_graph(graphs, *args)  # type: ignore[arg-type]
        if logits is not None:
            rows.append(len(logits))
        return logits

    monkeypatch.setattr(StepGraphs, "run", counted)
    return rows


def with_graphs(runner: ModelRunner, limits: GraphLimits = FEW) -> ModelRunner:
    runner.capture(limits)
    return runner


def make_graphed_runner(folder: Path, limits: GraphLimits = FEW, num_blocks: int = NUM_BLOCKS) -> ModelRunner:
    return with_graphs(make_runner(folder, device=interpreted(), num_blocks=num_blocks), limits)


Scene = tuple[ModelRunner, list[torch.Tensor]]
"""A runner and the keys and values of its layers."""


def make_scene(folder: Path, limits: GraphLimits | None) -> Scene:
    """A runner whose cache holds the same random numbers each time, as of tokens that are computed.

    Without limits it has no graphs.
    """
    caches: list[torch.Tensor] = []
    allocate = TritonAttention.allocate

    def noticed(*args: Any) -> LayerCache:
        cache = allocate(*args)
        caches.extend([cache.keys, cache.values])
        return cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonAttention, "allocate", noticed)
        runner = make_runner(folder, device=interpreted(), num_blocks=NUM_BLOCKS)
    if limits is not None:
        runner.capture(limits)
    fill_caches(caches)
    return runner, caches


def fill_caches(caches: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for tensor in caches:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="module")
def scenes(tiny_model_dir: Path) -> list[Scene]:
    """With graphs and without."""
    return [make_scene(tiny_model_dir, limits) for limits in (LIMITS, None)]


@pytest.fixture
def graphed(scenes: list[Scene]) -> ModelRunner:
    return scenes[0][0]


@pytest.mark.long
def test_together(tiny_model_dir: Path, graphed: ModelRunner, used: list[int]) -> None:
    """Three sequences in the graph for four."""
    prompts = make_prompts()
    assert run(core_of(tiny_model_dir, graphed), prompts).token_ids == expected_ids(tiny_model_dir, prompts)
    assert used == [3] * (MAX_NEW_TOKENS - 1)


def test_beside_chunks_and_with_sequences_that_come_and_go(
    tiny_model_dir: Path, graphed: ModelRunner, used: list[int]
) -> None:
    """Graphs and steps that are launched as they come take turns, over the same cache."""
    prompts = make_prompts(sizes=[1, 17, 40, 5])
    outcome = run(core_of(tiny_model_dir, graphed, max_batch_tokens=24), prompts, is_staggered=True)
    assert outcome.token_ids == expected_ids(tiny_model_dir, prompts)
    assert len(set(used)) > 1


@pytest.mark.long
def test_with_preemption(tiny_model_dir: Path, used: list[int]) -> None:
    prompts = make_prompts(sizes=[31, 30])
    runner = make_graphed_runner(tiny_model_dir, num_blocks=5)
    outcome = run(core_of(tiny_model_dir, runner, num_blocks=5), prompts)
    assert outcome.num_preemptions > 0
    assert outcome.token_ids == expected_ids(tiny_model_dir, prompts)
    assert used


def test_drafts(tiny_model_dir: Path, graphed: ModelRunner, used: list[int]) -> None:
    """Each draft has the right token first, then a wrong one."""
    prompts = make_prompts(sizes=[9, 20])
    expected = expected_ids(tiny_model_dir, prompts)

    def propose(token_ids: npt.NDArray[np.int32], max_tokens: int) -> Proposal:
        known = token_ids.tolist()
        for prompt, ids in zip(prompts, expected, strict=True):
            if known[: len(prompt)] == prompt:
                right = ids[len(known) - len(prompt)]
                return Proposal([right, 255 - right][:max_tokens], 16)
        raise AssertionError("a sequence of another test")

    speculator = Speculator(propose, StepCosts({1: 1.0, 64: 1.0}), 4)
    assert run(core_of(tiny_model_dir, graphed, speculator=speculator), prompts).token_ids == expected
    assert max(used) > 3, "drafts are rows"


def test_experts(tmp_path: Path, used: list[int]) -> None:
    """The router's choice is data, and rows of padding, which choose experts, too, reach no other row."""
    write_tiny_qwen2_moe(tmp_path)
    prompts = make_prompts(sizes=[3])
    assert run(core_of(tmp_path, make_graphed_runner(tmp_path)), prompts).token_ids == expected_ids(tmp_path, prompts)
    assert used == [1] * (MAX_NEW_TOKENS - 1)


def check_checkpoint(name: str, used: list[int]) -> None:
    """The ids of `transformers` on the dequantized weights: one from a prompt, one from a graph."""
    folder = CHECKPOINTS / name
    stored = np.load(folder / "expected.npz")
    outcome = run(core_of(folder, make_graphed_runner(folder)), [stored["prompt_0"].tolist()], max_new_tokens=2)
    assert outcome.token_ids == [stored["ids_0"][:2].tolist()]
    assert used == [1]


@pytest.mark.long
def test_a_quantized_checkpoint(used: list[int]) -> None:
    check_checkpoint("auto-gptq-4bit-g32-act", used)


def test_int8(tiny_model_dir: Path, used: list[int]) -> None:
    prompts = make_prompts(sizes=[20, 3])
    device, plain = (
        make_quantized_runner(tiny_model_dir, device, "int8", torch.float32) for device in (interpreted(), PLAIN)
    )
    outcome = run(core_of(tiny_model_dir, with_graphs(device)), prompts)
    assert outcome.token_ids == expected_ids(tiny_model_dir, prompts, plain)
    assert used


# ---- bits ----

Part = tuple[int, list[int]]
"""A sequence: its known tokens, of which the last one is computed, and a draft."""


def decode_batch(parts: list[Part]) -> ScheduledBatch:
    batch = ScheduledBatch()
    first_block = 0
    for number, (num_known, draft) in enumerate(parts):
        num_blocks = -(-(num_known + len(draft)) // BLOCK_SIZE)
        blocks = range(first_block, first_block + num_blocks)
        first_block += num_blocks
        sequence: Sequence = make_sequence(random_ids(num_known, number), [*blocks])
        sequence.num_computed_tokens = num_known - 1
        batch.add(sequence, 1, draft)
    return batch


STEPS: dict[str, list[Part]] = {
    "one": [(40, [])],
    "padded": [(17, []), (3, []), (64, [])],
    "drafts": [(30, [5, 6]), (1, []), (16, [7, 8, 9])],
    "full": [(20 + index, []) for index in range(8)],
    "long": [(257, []), (100, [1])],
}


@pytest.mark.parametrize("name", STEPS)
def test_a_row_has_the_bits_that_it_has_without_a_graph(scenes: list[Scene], used: list[int], name: str) -> None:
    batch = decode_batch(STEPS[name])
    (graphed, caches), (plain, plain_caches) = scenes
    fill_caches(caches)
    fill_caches(plain_caches)
    assert torch.equal(graphed.execute(batch).logits, plain.execute(batch).logits)
    assert used == [batch.num_rows]
    for cache, other in zip(caches, plain_caches, strict=True):
        assert torch.equal(cache, other), "padding writes neither keys nor values"


def test_steps_that_do_not_fit_are_launched_as_they_come(graphed: ModelRunner, used: list[int]) -> None:
    graphed.execute(decode_batch([(9, [])] * 9))
    graphed.execute(decode_batch([(9, list(range(9)))]))  # a draft that needs other tiles
    assert used == []


# ---- memory ----


def count_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("is_graphed", [True, False])
def test_nothing_that_a_step_allocates_outlives_it(scenes: list[Scene], is_graphed: bool) -> None:
    runner, _ = scenes[0 if is_graphed else 1]
    batch = decode_batch(STEPS["padded"])
    runner.execute(batch)
    before = count_tensors()
    for _ in range(2):
        runner.execute(batch)
    assert count_tensors() == before


def test_logits_of_a_graph_stay_in_one_place(graphed: ModelRunner) -> None:
    places = {graphed.execute(decode_batch([(num_known, [])])).logits.data_ptr() for num_known in (3, 40, 200)}
    assert len(places) == 1
