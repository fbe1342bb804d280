"""Steps are padded to the rows of a captured graph, and reach it through memory that stays where it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.graph_capture import Recorder, Tape, Work
from engine.graphs import GraphLimits, StepGraphs, capture_graphs, graph_bytes
from engine.step_buffers import StepTensors
from engine.step_inputs import StepInputs

CPU = torch.device("cpu")
BLOCK_SIZE, ITEM_TOKENS = 16, 32
LIMITS = GraphLimits(sizes=(2, 0, 8, 4, 2), max_seq_len=64, num_kv_tokens=256)


class Attention:
    """The part of a backend that plans: an item [sequence, first token] for every 32 tokens of a sequence."""

    block_size = BLOCK_SIZE
    max_captured_tokens = 5

    def work_items(
        self, query_start_loc: Sequence[int], seq_lens: Sequence[int], table_width: int
    ) -> npt.NDArray[np.int32]:
        items = [(number, first) for number, seq_len in enumerate(seq_lens) for first in range(0, seq_len, ITEM_TOKENS)]
        return np.array(items, np.int32)


ATTENTION: Any = Attention()


def decode(seq_lens: Sequence[int], drafts: Sequence[int] = (), **changes: Any) -> StepInputs:
    """A token of each sequence, whose ids are 100 and more, and so many drafted ones after it."""
    counts = [1 + draft for draft in drafts] or [1] * len(seq_lens)
    starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
    width = -(-max(seq_lens) // BLOCK_SIZE)
    inputs = StepInputs(
        input_ids=list(range(100, 100 + starts[-1])),
        query_start_loc=starts,
        seq_lens=list(seq_lens),
        block_table=np.arange(1, 1 + width * len(seq_lens), dtype=np.int32).tobytes(),
        prompt_lens=[1] * len(seq_lens),
        logits_indices=list(range(starts[-1])),
        scored_indices=[],
        scored_token_ids=[],
    )
    return StepInputs(**{name: getattr(inputs, name) for name in inputs.__struct_fields__} | changes)


class Scene:
    """Captured work that gives each row's id, position and slot, and remembers what it was captured with."""

    def __init__(self, recorder: Recorder | None = None, limits: GraphLimits = LIMITS, num_ranks: int = 1) -> None:
        self.captured: list[StepTensors] = []
        with torch.inference_mode():
            self.graphs = capture_graphs(recorder or Tape(), self._compute, ATTENTION, limits, CPU, num_ranks=num_ranks)

    def _compute(self, tensors: StepTensors) -> torch.Tensor:
        self.captured.append(tensors)
        return torch.stack([tensors.input_ids, tensors.positions, tensors.attention.slot_mapping], dim=1)

    def run(self, inputs: StepInputs) -> torch.Tensor | None:
        items = ATTENTION.work_items(inputs.query_start_loc, inputs.seq_lens, inputs.table_width)
        with torch.inference_mode():
            return self.graphs.run(inputs, items)


def test_the_largest_bucket_is_captured_first_and_each_once() -> None:
    assert [len(tensors.input_ids) for tensors in Scene().captured] == [8, 4, 2]


@pytest.mark.parametrize(("seq_lens", "drafts", "bucket"), [([9], [], 2), ([9, 17, 3], [], 4), ([9, 40], [1, 4], 8)])
def test_a_step_takes_the_smallest_bucket_that_fits(seq_lens: list[int], drafts: list[int], bucket: int) -> None:
    scene, inputs = Scene(), decode(seq_lens, drafts)
    rows = scene.run(inputs)
    assert rows is not None
    assert len(rows) == len(inputs.input_ids)
    assert rows[:, 0].tolist() == inputs.input_ids
    tensors = next(tensors for tensors in scene.captured if len(tensors.input_ids) == bucket)
    num_padded = bucket - len(rows)
    assert tensors.input_ids.tolist() == inputs.input_ids + [0] * num_padded
    assert tensors.positions[len(rows) :].tolist() == [0] * num_padded
    assert tensors.attention.slot_mapping[len(rows) :].tolist() == [-1] * num_padded, "nothing is written for them"


def test_numbers_of_earlier_steps_do_not_show() -> None:
    """A step of 8 rows was here before: padding of the next one is padding."""
    scene = Scene()
    scene.run(decode([60] * 8))
    rows = scene.run(decode([17, 5, 9]))
    assert rows is not None
    # Tables of two blocks each: position 16 is the first of block 2, positions 4 and 8 lie in blocks 3 and 5.
    assert rows.tolist() == [[100, 16, 32], [101, 4, 52], [102, 8, 88]]
    four_rows = scene.captured[1]
    assert four_rows.attention.slot_mapping.tolist() == [32, 52, 88, -1]


def test_places_are_those_of_the_capture() -> None:
    scene = Scene()
    places = [
        rows.data_ptr() for rows in map(scene.run, [decode([3]), decode([60]), decode([5, 64])]) if rows is not None
    ]
    assert len(set(places)) == 1
    assert len(places) == 3


@pytest.mark.parametrize(
    "inputs",
    [
        decode([5] * 9),
        decode([9], [5]),
        decode([5, 9], logits_indices=[1]),
        decode([5, 9], scored_indices=[0], scored_token_ids=[7]),
        decode([5, 9], block_table=np.zeros(8 * 20, np.int32).tobytes()),
    ],
    ids=[
        "more rows than any bucket",
        "more tokens than attention has in graphs",
        "a prompt under way",
        "a prompt is scored",
        "a table too wide",
    ],
)
def test_other_steps_are_not_for_graphs(inputs: StepInputs) -> None:
    assert Scene().run(inputs) is None


def test_more_work_items_than_planned_are_not_for_graphs() -> None:
    limits = dataclasses.replace(LIMITS, num_kv_tokens=8 * ITEM_TOKENS)
    assert Scene(limits=limits).run(decode([ITEM_TOKENS] * 8)) is not None
    assert Scene(limits=limits).run(decode([2 * ITEM_TOKENS] * 8)) is None


class Failing:
    """Has place for graphs of at most so many rows."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows

    def capture(self, work: Work) -> Work:
        replay = Tape().capture(work)
        if len(replay()) > self._max_rows:
            raise torch.OutOfMemoryError("no memory\nmore of it")
        return replay


def test_where_memory_is_out_smaller_graphs_serve(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(Failing(4))
    assert "No graph for 8 rows: no memory" in caplog.text
    assert scene.graphs.describe().startswith("Graphs for steps of up to 2, 4 rows, captured in ")
    assert scene.run(decode([3] * 5)) is None
    rows = scene.run(decode([3] * 4))
    assert rows is not None
    assert rows[:, 0].tolist() == [100, 101, 102, 103]


def test_several_ranks_have_all_graphs_or_do_not_start() -> None:
    """A step that is a graph's on one rank alone has padding there, and the ranks' sums would have other shapes."""
    with pytest.raises(torch.OutOfMemoryError):
        Scene(Failing(4), num_ranks=2)


def test_without_any_graph_every_step_is_launched_as_it_comes() -> None:
    scene = Scene(Failing(0))
    assert isinstance(scene.graphs, StepGraphs)
    assert scene.run(decode([3])) is None


def test_memory_of_graphs_grows_with_rows_and_buckets() -> None:
    per_graph = graph_bytes([1], 0, 0)
    assert graph_bytes([], 1000, 50) == 0
    assert graph_bytes([8, 4], 1000, 50) == 8 * 1000 + 12 * 50 * 4 + 2 * per_graph
