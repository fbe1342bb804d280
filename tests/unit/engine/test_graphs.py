"""Steps are padded to the rows of a captured graph, and reach it through memory that stays where it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.base import AttentionShape
from engine.attention.triton import TritonAttention
from engine.graph_capture import CaptureError, Recorder, Tape, Work
from engine.graphs import (
    GRAPH_BYTES,
    MAX_PACKED_ROWS,
    GraphLimits,
    StaticStepBuffers,
    capture_graphs,
    graph_bytes,
    max_work_items,
    section_sizes,
)
from engine.link.errors import StartError
from engine.step_buffers import StepTensors
from engine.step_inputs import StepInputs
from parallel.state import RankLostError
from quant.kernels.skinny_triton import MAX_ROWS
from quant.kernels.widen_triton import OUTPUTS_AT_A_TIME

CPU = torch.device("cpu")
BLOCK_SIZE, ITEM_TOKENS, WORK_BYTES = 16, 32, 1000
LIMITS = GraphLimits(sizes=(2, 0, 8, 4, 2), max_seq_len=64, num_kv_tokens=256)


class Attention:
    """The part of a backend that plans: an item [sequence, first token] for every 32 tokens of a sequence."""

    block_size = BLOCK_SIZE
    max_captured_tokens = 5

    def work_bytes(self, num_items: int) -> int:
        return num_items * WORK_BYTES

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

    def __init__(self, recorder: Recorder | None = None, limits: GraphLimits = LIMITS) -> None:
        self.captured: list[StepTensors] = []
        with torch.inference_mode():
            self.graphs = capture_graphs(recorder or Tape(), self._compute, ATTENTION, limits, CPU)

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


@pytest.mark.parametrize("seq_lens", [[3], [60], [64] * 8])
def test_no_more_is_copied_than_the_block_table_has(seq_lens: list[int]) -> None:
    """A window of 32,768 tokens has 2,048 blocks in each row, of which most steps use few."""
    inputs = decode(seq_lens)
    items = ATTENTION.work_items(inputs.query_start_loc, inputs.seq_lens, inputs.table_width)
    most_items = max_work_items(ATTENTION, LIMITS)
    num_words = []
    for table in (inputs.block_table, bytes(8 * 4 * 4)):
        buffers = StaticStepBuffers(torch.device("meta"), BLOCK_SIZE, section_sizes(BLOCK_SIZE, LIMITS, most_items))
        step = StepInputs(**{name: getattr(inputs, name) for name in inputs.__struct_fields__} | {"block_table": table})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", lambda to, source, **options: num_words.append(source.numel()))
            buffers.fill_rows(step, items, 8)
    used, whole = num_words
    assert whole - used == (8 * 4 * 4 - len(inputs.block_table)) // 8


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


def test_shared_prefixes_fit_until_they_fill_the_cache_twice() -> None:
    scene = Scene(limits=dataclasses.replace(LIMITS, num_kv_tokens=128))
    assert scene.run(decode([64] * 4 + [32] * 4)) is not None
    assert scene.run(decode([64] * 5 + [32] * 3)) is None


WINDOW, KV_TOKENS, NUM_ROWS = 2048, 8192, 32


@st.composite
def full_caches(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths of sequences that share no block of a cache, and the tokens of the draft of each."""
    num_drafted = draw(st.sampled_from([0, 0, 2, 4]))
    lens: list[int] = []
    num_free = KV_TOKENS
    while len(lens) < NUM_ROWS // (1 + num_drafted) and num_free >= BLOCK_SIZE:
        longest = min(WINDOW, num_free)
        lens.append(draw(st.integers(1 + num_drafted, longest) | st.sampled_from([longest, min(longest, 257)])))
        num_free -= -(-lens[-1] // BLOCK_SIZE) * BLOCK_SIZE
    return lens, num_drafted


@given(cache=full_caches())
@settings(deadline=None)
def test_decoding_sequences_that_share_nothing_always_have_their_graph(cache: tuple[list[int], int]) -> None:
    """However uneven their lengths are: the server's busiest hours are no time to go without."""
    seq_lens, num_drafted = cache
    attention = TritonAttention(AttentionShape(num_heads=28, num_kv_heads=4, head_dim=128), BLOCK_SIZE)
    limits = GraphLimits(sizes=(NUM_ROWS,), max_seq_len=WINDOW, num_kv_tokens=KV_TOKENS, max_draft_tokens=num_drafted)
    inputs = decode(seq_lens, [num_drafted] * len(seq_lens))
    items = attention.work_items(inputs.query_start_loc, inputs.seq_lens, inputs.table_width)
    assert items.size <= max_work_items(attention, limits).size


@pytest.mark.parametrize(
    ("window", "kv_tokens", "num_chunks"),
    [(32768, 1 << 20, 32 * 128), (131072, 1 << 20, 16 * 512 + 16), (131072, 131072, 2 * 512 + 30)],
)
def test_long_windows_take_no_more_place_than_the_cache_can_use(window: int, kv_tokens: int, num_chunks: int) -> None:
    attention = TritonAttention(AttentionShape(num_heads=28, num_kv_heads=4, head_dim=128), BLOCK_SIZE)
    limits = GraphLimits(sizes=(32, 1), max_seq_len=window, num_kv_tokens=kv_tokens)
    assert len(max_work_items(attention, limits)) == 1 + 32 + num_chunks


class Failing:
    """Captures the first graph, fails at the second, and must not be asked for more."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error
        self.num_captures = 0

    def capture(self, work: Work) -> Work:
        self.num_captures += 1
        if self.num_captures == 2:
            raise self._error
        return Tape().capture(work)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, CaptureError])
def test_a_graph_that_cannot_be_captured_ends_the_start(kind: type[RuntimeError]) -> None:
    """Nothing more is captured, as on a GPU torch may be left in the middle of it."""
    recorder = Failing(kind("no memory\nmore of it"))
    expected = (
        r"^No graph can be captured for steps of 4 rows \(no memory\): give --cuda-graphs 0, or fewer or smaller "
    )
    with pytest.raises(StartError, match=expected):
        Scene(recorder)
    assert recorder.num_captures == 2


def test_a_rank_that_is_lost_meanwhile_is_no_failed_capture() -> None:
    with pytest.raises(RankLostError, match="^rank 0 is gone$"):
        Scene(Failing(RankLostError("rank 0 is gone")))


def test_the_summary_of_the_start_names_the_graphs() -> None:
    assert Scene().graphs.describe().startswith("Graphs for steps of up to 2, 4, 8 rows, captured in ")


def test_memory_of_graphs_grows_with_rows_and_buckets() -> None:
    def num_bytes(*sizes: int, per_row: int = 0, max_inputs: int = 0, vocab_size: int = 0) -> int:
        limits = dataclasses.replace(LIMITS, sizes=sizes)
        return graph_bytes(
            limits, ATTENTION, activation_bytes_per_row=per_row, max_inputs=max_inputs, vocab_size=vocab_size
        )

    assert num_bytes(0, per_row=1000, vocab_size=50) == 0
    assert num_bytes(8, 4, per_row=1000, vocab_size=50) - num_bytes(8, 4) == 8 * 1000 + 12 * 50 * 4
    assert num_bytes(8, 4) - num_bytes(8) == GRAPH_BYTES
    items, table = 8 * 2, 8 * 4
    num_numbers = num_bytes(8) - GRAPH_BYTES - items * WORK_BYTES
    assert num_numbers == 4 * (2 * items + table) + 8 * 8 * 8 + 4 * (2 * 8 + 1)
    assert num_bytes(64, max_inputs=100) == num_bytes(64)
    assert num_bytes(65, 8, max_inputs=100) - num_bytes(65, 8) == OUTPUTS_AT_A_TIME * 100 * 2
    assert MAX_PACKED_ROWS == MAX_ROWS, "as in the kernels"
