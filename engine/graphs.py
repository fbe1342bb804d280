"""Graphs of whole steps: one for each bucket of rows, captured at the start, and the memory that they read.

A bucket takes every step that has at most so many tokens, each of them with logits: a token of each sequence, and
drafts. The step is padded to the bucket's rows. Rows of padding belong to no sequence, write no keys and values, and
their results are not looked at. What a step changes lies in memory that never moves, so a graph serves any sequences.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import AttentionBackend, AttentionMetadata
from engine.graph_capture import Recorder, Work
from engine.link.errors import StartError
from engine.link.progress import Stage, StartProgress
from engine.step_buffers import MIN_SECTION_WORDS, SECTIONS, StepBuffers, StepTensors, num_words
from engine.step_inputs import BLOCK_BYTES, StepInputs
from parallel.state import RankLostError
from quant.packing import OUTPUTS_AT_A_TIME

DEFAULT_GRAPH_SIZES = (1, 2, 4, 8, 16, 32)
MAX_GRAPH_ROWS = 512
"""Rows of the largest graph. Larger steps take so long that launching them one by one costs nothing."""
GRAPH_BYTES = 16 << 20
"""Memory set aside for what a driver keeps of each graph. Not measured: a graph of Qwen2-7B has some 400 launches."""
MAX_PACKED_ROWS, WIDENED_BYTES = 64, 2
"""Rows up to which kernels multiply with packed weights. Beyond, `OUTPUTS_AT_A_TIME` are widened to 16 bits."""
PADDING = {"input_ids": 0, "positions": 0, "slot_mapping": -1}
"""The sections with a number for each token, and that of a row of padding."""

Integers = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GraphLimits:
    """The largest steps that graphs take. Others are launched as they come."""

    sizes: Sequence[int]
    """Rows of each bucket, in any order; 0 stands for none."""
    max_seq_len: int
    num_kv_tokens: int
    max_draft_tokens: int = 0

    @property
    def buckets(self) -> list[int]:
        """The largest first, so that the memory of its capture has place for the others'."""
        return sorted({size for size in self.sizes if size > 0}, reverse=True)


def graph_bytes(
    limits: GraphLimits,
    attention: AttentionBackend,
    *,
    activation_bytes_per_row: int,
    max_inputs: int,
    vocab_size: int,
) -> int:
    """Memory that graphs take, beside what a step takes anyway.

    The activations of the largest bucket, attention's own results and a part of a weight that is widened, whose memory
    the others use as well, the numbers of a step, the logits of each bucket in float32, and what the driver keeps.
    """
    buckets = limits.buckets
    if not buckets:
        return 0
    items = max_work_items(attention, limits)
    numbers = sum(
        size * SECTIONS[name].itemsize for name, size in section_sizes(attention.block_size, limits, items).items()
    )
    shared = buckets[0] * activation_bytes_per_row + attention.work_bytes(len(items))
    if buckets[0] > MAX_PACKED_ROWS:
        shared += OUTPUTS_AT_A_TIME * max_inputs * WIDENED_BYTES
    logits = sum(buckets) * vocab_size * torch.float32.itemsize
    return shared + numbers + logits + len(buckets) * GRAPH_BYTES


class StaticStepBuffers(StepBuffers):
    """Memory for the numbers of steps that graphs compute: places never change."""

    def __init__(self, device: torch.device, block_size: int, max_sizes: dict[str, int]) -> None:
        """`max_sizes`: the most numbers of each section."""
        super().__init__(device, block_size)
        self._max_sizes = max_sizes
        words = {name: num_words((max_sizes[name],), dtype) for name, dtype in SECTIONS.items()}
        # Whole multiples, so that every section begins at an address that kernels load from well.
        self._capacities = {name: -(-size // MIN_SECTION_WORDS) * MIN_SECTION_WORDS for name, size in words.items()}
        self._first_of_table = sum(self._capacities.values()) - self._capacities["block_table"]
        self._allocate()
        self._make_views([(max_sizes[name],) for name in SECTIONS])

    def fits(self, inputs: StepInputs, work_items: Integers) -> bool:
        """Whether there is place for a step that has no more rows than the largest bucket."""
        num_table_entries = len(inputs.block_table) // BLOCK_BYTES
        return num_table_entries <= self._max_sizes["block_table"] and work_items.size <= self._max_sizes["work_items"]

    def fill_rows(
        self, inputs: StepInputs, work_items: Integers, num_rows: int, last_token_ids: torch.Tensor | None = None
    ) -> None:
        """Take in the numbers of a step, padded to `num_rows` tokens, as `fill` does."""
        lists = self._lists(inputs)
        for index, name in enumerate(SECTIONS):
            if name in PADDING:
                lists[index] = [*lists[index], *[PADDING[name]] * (num_rows - len(lists[index]))]
        self._wait()
        self._write(lists, work_items, inputs.block_table)
        # The block table comes last, and is far from full in most steps.
        self._num_words = self._first_of_table + num_words((len(inputs.block_table),), torch.uint8)
        self._send()
        self._take_unknown(len(inputs.unknown_places), last_token_ids)

    def tensors(self, num_rows: int, num_fields: int) -> StepTensors:
        """The places of a step with `num_rows` tokens, of as many sequences or fewer; work items have `num_fields`."""
        sections, tokens = self._tensors, {name: self._tensors[name][:num_rows] for name in PADDING}
        return StepTensors(
            input_ids=tokens["input_ids"],
            positions=tokens["positions"],
            logits_indices=sections["logits_indices"][:num_rows],
            scored_indices=sections["scored_indices"],
            scored_token_ids=sections["scored_token_ids"],
            attention=AttentionMetadata(
                query_start_loc=sections["query_start_loc"][: num_rows + 1],
                seq_lens=sections["seq_lens"][:num_rows],
                block_table=sections["block_table"],
                slot_mapping=tokens["slot_mapping"],
                work_items=sections["work_items"].view(-1, num_fields),
                host_query_start_loc=range(num_rows + 1),
                host_seq_lens=[1] * num_rows,
            ),
        )


class StepGraphs:
    """The captured steps, by bucket."""

    def __init__(self, buffers: StaticStepBuffers, replays: dict[int, Work], max_tokens: int, seconds: float) -> None:
        """A sequence of a step may have up to `max_tokens`; `seconds` is the time that capturing took."""
        self._buffers = buffers
        self._max_tokens = max_tokens
        self._replays = dict(sorted(replays.items()))
        self._seconds = seconds

    def describe(self) -> str:
        """A line for the summary of the start."""
        buckets = ", ".join(map(str, self._replays))
        return f"Graphs for steps of up to {buckets} rows, captured in {self._seconds:.1f} s"

    def run(
        self, inputs: StepInputs, work_items: Integers, last_token_ids: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Logits [len(inputs.input_ids), vocab_size], which the next step overwrites; None: not a step for graphs."""
        num_rows = len(inputs.input_ids)
        bucket = next((rows for rows in self._replays if rows >= num_rows), None)
        starts = inputs.query_start_loc
        is_decoding = inputs.is_decoding and max(map(operator.sub, starts[1:], starts)) <= self._max_tokens
        if bucket is None or not is_decoding or not self._buffers.fits(inputs, work_items):
            return None
        self._buffers.fill_rows(inputs, work_items, bucket, last_token_ids)
        return self._replays[bucket]()[:num_rows]


def capture_graphs(
    recorder: Recorder,
    compute: Callable[[StepTensors], torch.Tensor],
    attention: AttentionBackend,
    limits: GraphLimits,
    device: torch.device,
    progress: StartProgress | None = None,
) -> StepGraphs:
    """Capture `compute`, from a step's tensors to the logits of all of its rows, for every bucket.

    Raises StartError for a graph that can't be captured, whatever the cause. A capture that breaks off may leave torch
    on the captured stream and its pool of memory open, where no later step would be safe; and other ranks may wait in
    the collectives of that graph.
    """
    started = time.monotonic()
    progress = progress or StartProgress()
    progress.begin(Stage.CAPTURING)
    buckets = limits.buckets
    items = max_work_items(attention, limits)
    buffers = StaticStepBuffers(device, attention.block_size, section_sizes(attention.block_size, limits, items))
    replays: dict[int, Work] = {}
    for rows in buckets:
        fill_first(buffers, attention, rows)
        tensors = buffers.tensors(rows, items.shape[1])
        try:
            replays[rows] = recorder.capture(functools.partial(compute, tensors))
        except RankLostError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise StartError(
                f"No graph can be captured for steps of {rows} rows ({reason}): give --cuda-graphs 0, or fewer or "
                "smaller sizes"
            ) from error
        progress.advance(len(replays) / len(buckets), f"Captured {len(replays)} of {len(buckets)} graphs")
    return StepGraphs(buffers, replays, attention.max_captured_tokens, time.monotonic() - started)


def max_work_items(attention: AttentionBackend, limits: GraphLimits) -> Integers:
    """The work items of the largest step that graphs have place for.

    Each row of the largest bucket is a sequence of full length, or as many rows are as fill the KV cache twice, each
    token of a draft counted as a sequence. Sequences that share no blocks always fit, however their lengths differ: a
    part that is not full is counted for each row. Beyond that only shared prefixes go: with long windows and many
    rows the partial results of attention would take memory that no other step needs.
    """
    num_rows, max_len = limits.buckets[0], max(1, limits.max_seq_len)
    max_tokens = min(1 + limits.max_draft_tokens, attention.max_captured_tokens)
    num_long = min(num_rows, -(-2 * max_tokens * limits.num_kv_tokens // max_len))
    seq_lens = [max_len] * num_long + [1] * (num_rows - num_long)
    return attention.work_items(range(num_rows + 1), seq_lens, -(-max_len // attention.block_size))


def section_sizes(block_size: int, limits: GraphLimits, items: Integers) -> dict[str, int]:
    """The most numbers of each section."""
    rows = limits.buckets[0]
    sizes = dict.fromkeys(SECTIONS, rows)
    num_blocks = -(-limits.max_seq_len // block_size)
    return sizes | {"query_start_loc": rows + 1, "work_items": items.size, "block_table": rows * num_blocks}


def fill_first(buffers: StaticStepBuffers, attention: AttentionBackend, rows: int) -> None:
    """Fill in a step of `rows` sequences that have one token each, all of them in the cache's first block."""
    starts = list(range(rows + 1))
    inputs = StepInputs(
        input_ids=[0] * rows,
        query_start_loc=starts,
        seq_lens=[1] * rows,
        block_table=bytes(rows * BLOCK_BYTES),
        prompt_lens=[1] * rows,
        logits_indices=starts[:-1],
        scored_indices=[],
        scored_token_ids=[],
    )
    buffers.fill_rows(inputs, attention.work_items(starts, inputs.seq_lens, inputs.table_width), rows)
