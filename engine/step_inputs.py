"""A step in numbers: what the forward pass must know of a scheduled batch, in a form that travels to every rank."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from typing import Any

import msgspec

from engine.scheduling.adapters import NO_SLOT
from engine.scheduling.batch import ScheduledBatch, ScheduledSequence

BLOCK_BYTES = 4
"""Bytes of a number in a block table."""


class StepInputs(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """One step in numbers, the same for every rank. `engine.step_buffers` puts them where the kernels read them.

    Positions and slots follow from these, and are worked out there.
    """

    input_ids: list[int]
    query_start_loc: list[int]
    seq_lens: list[int]
    block_table: bytes
    """[num_seqs, max_blocks] int32: each sequence's blocks, padded with 0."""
    prompt_lens: list[int]
    """The length of each sequence's prompt."""
    logits_indices: list[int]
    """Rows of the tokens whose successor is chosen: a sequence's last known one, and its draft."""
    scored_indices: list[int]
    """Rows of prompt tokens whose successor in the prompt is scored."""
    scored_token_ids: list[int]
    """The prompt tokens that follow the rows of `scored_indices`."""
    num_scored_top_tokens: int = 0
    """Number of the likeliest tokens to find beside each scored one."""
    has_scored_ranks: bool = False
    """Whether to find the rank of each scored token."""
    unknown_places: list[int] = []
    """Places in `input_ids` of tokens that the step before has chosen and the host doesn't know yet."""
    unknown_rows: list[int] = []
    """The rows of that step which chose them."""

    adapters: list[tuple[int, int]] = []
    """The adapters of the step: slot and number of each; empty: no sequence has one."""
    adapter_slots: list[int] = []
    """The slot of each sequence's adapter, -1 for none; empty where `adapters` is."""

    block_copies: list[tuple[int, int]] = []
    """KV blocks that are copied first, in all layers: from, to. All are read before one is written."""

    @property
    def table_width(self) -> int:
        """Numbers that the block table has for each sequence."""
        return len(self.block_table) // BLOCK_BYTES // len(self.seq_lens)

    @property
    def is_decoding(self) -> bool:
        """Whether the successor of each token is chosen, and no token is scored."""
        return len(self.logits_indices) == len(self.input_ids) and not self.scored_indices

    @property
    def is_selecting(self) -> bool:
        """Whether some tokens' hidden states are not needed: the successor of none of them is chosen or scored."""
        return len(self.logits_indices) < len(self.input_ids) and not self.scored_indices


def step_inputs(batch: ScheduledBatch) -> StepInputs:
    """The numbers of a scheduled batch."""
    input_ids: list[int] = []
    starts = [0]
    seq_lens: list[int] = []
    logits_indices: list[int] = []
    scored_indices: list[int] = []
    scored_token_ids: list[int] = []
    unknown_places, unknown_rows = list[int](), list[int]()
    for scheduled in batch.scheduled:
        sequence, draft, first = scheduled.sequence, scheduled.draft, scheduled.num_computed_tokens
        if scheduled.num_scored_tokens:
            scored, offset = _scored_positions(scheduled), len(input_ids) - first
            scored_indices += range(offset + scored.start, offset + scored.stop)
            scored_token_ids += sequence.token_ids[scored.start + 1 : scored.stop + 1]
        input_ids += sequence.token_ids[first : first + scheduled.num_tokens]
        if scheduled.is_completing and sequence.has_unknown_token:
            unknown_places.append(len(input_ids) - 1)
            unknown_rows.append(sequence.unknown_row)
        input_ids += draft
        starts.append(len(input_ids))
        seq_lens.append(first + scheduled.num_tokens + len(draft))
        if scheduled.is_completing:
            logits_indices += range(len(input_ids) - 1 - len(draft), len(input_ids))
    return StepInputs(
        input_ids=input_ids,
        query_start_loc=starts,
        seq_lens=seq_lens,
        block_table=_padded([scheduled.sequence.block_table for scheduled in batch.scheduled]),
        prompt_lens=[scheduled.sequence.num_prompt_tokens for scheduled in batch.scheduled],
        logits_indices=logits_indices,
        scored_indices=scored_indices,
        scored_token_ids=scored_token_ids,
        num_scored_top_tokens=batch.num_prompt_top_tokens,
        has_scored_ranks=batch.has_prompt_ranks,
        unknown_places=unknown_places,
        unknown_rows=unknown_rows,
        block_copies=batch.block_copies,
        **_adapters(batch),
    )


def _adapters(batch: ScheduledBatch) -> dict[str, Any]:
    """The fields about adapters; nothing where no sequence has one."""
    adapters = [scheduled.sequence.adapter for scheduled in batch.scheduled]
    known = {adapter for adapter in adapters if adapter is not None}
    if not known:
        return {}
    return {
        "adapters": sorted((adapter.slot, adapter.number) for adapter in known),
        "adapter_slots": [NO_SLOT if adapter is None else adapter.slot for adapter in adapters],
    }


def _scored_positions(scheduled: ScheduledSequence) -> range:
    """The places in the sequence of the prompt tokens whose successors the step scores."""
    first = len(scheduled.sequence.prompt_logprobs)
    return range(first, first + scheduled.num_scored_tokens)


def _padded(tables: Collection[array[int]]) -> bytes:
    """The numbers of arrays one after the other, each filled up with 0 to the length of the longest."""
    num_bytes = max(len(table) * table.itemsize for table in tables)
    return b"".join([table.tobytes().ljust(num_bytes, b"\0") for table in tables])
