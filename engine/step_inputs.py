"""A step in numbers: what the forward pass must know of a scheduled batch, as plain lists that travel to every rank."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from engine.scheduling.batch import ScheduledBatch


class StepInputs(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """One step in numbers, the same for every rank. `engine.step_buffers` puts them where the kernels read them."""

    input_ids: list[int]
    positions: list[int]
    """The place of each token in its sequence."""
    query_start_loc: list[int]
    seq_lens: list[int]
    block_table: list[list[int]]
    slot_mapping: list[int]
    prompt_lens: list[int]
    """The length of each sequence's prompt."""
    logits_indices: list[int]
    """Rows of the tokens whose successor is chosen: a sequence's last known one, and its draft."""
    scored_indices: list[int]
    """Rows of prompt tokens whose successor in the prompt is scored."""
    scored_token_ids: list[int]
    """The prompt tokens that follow the rows of `scored_indices`."""


def step_inputs(batch: ScheduledBatch, block_size: int) -> StepInputs:
    """The numbers of a scheduled batch whose blocks have `block_size` tokens."""
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    seq_lens: list[int] = []
    logits_indices: list[int] = []
    scored_indices: list[int] = []
    scored_token_ids: list[int] = []
    for scheduled in batch.scheduled:
        sequence, draft, num_scored = scheduled.sequence, scheduled.draft, scheduled.num_scored_tokens
        first = sequence.num_computed_tokens
        seq_len = first + scheduled.num_tokens + len(draft)
        if num_scored:
            next_scored = 1 + len(sequence.prompt_logprobs)
            row = len(input_ids) + next_scored - 1 - first
            scored_indices += range(row, row + num_scored)
            scored_token_ids += sequence.token_ids[next_scored : next_scored + num_scored]
        input_ids += sequence.token_ids[first : first + scheduled.num_tokens] + draft
        positions += range(first, seq_len)
        slots += _slots(sequence.block_table, first, seq_len, block_size)
        starts.append(len(input_ids))
        seq_lens.append(seq_len)
        if scheduled.is_completing:
            logits_indices += range(len(input_ids) - 1 - len(draft), len(input_ids))
    return StepInputs(
        input_ids=input_ids,
        positions=positions,
        query_start_loc=starts,
        seq_lens=seq_lens,
        block_table=_padded([scheduled.sequence.block_table for scheduled in batch.scheduled]),
        slot_mapping=slots,
        prompt_lens=[scheduled.sequence.num_prompt_tokens for scheduled in batch.scheduled],
        logits_indices=logits_indices,
        scored_indices=scored_indices,
        scored_token_ids=scored_token_ids,
    )


def _slots(block_table: list[int], first: int, end: int, block_size: int) -> Iterable[int]:
    """Where the KV of the positions `first` to `end` goes."""
    return (block_table[position // block_size] * block_size + position % block_size for position in range(first, end))


def _padded(tables: list[list[int]]) -> list[list[int]]:
    """Lists of the same length, filled up with 0."""
    width = max(map(len, tables))
    return [table + [0] * (width - len(table)) for table in tables]
