"""ModelRunner: a scheduled batch -> tensors -> logits. Owns the model, the KV memory and the attention backend."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable
from typing import Any

import msgspec
import torch

from engine.attention import ATTENTION_BACKENDS
from engine.attention.base import AttentionBackend, AttentionMetadata
from engine.device import Device
from engine.link.registry import import_entry
from engine.models.base import CausalLM
from engine.scheduling.batch import ScheduledBatch

logger = logging.getLogger(__name__)

BLOCK_SIZE = 16
SCORED_ROWS = 64
"""Rows of logits that exist at a time to score a prompt: 40 MB with a vocabulary of 152k, and as quick as more."""


class StepInputs(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """One step in numbers, the same for every rank; the lists become tensors as `AttentionMetadata` describes them."""

    input_ids: list[int]
    positions: list[int]
    """Of each token in its sequence."""
    query_start_loc: list[int]
    seq_lens: list[int]
    block_table: list[list[int]]
    slot_mapping: list[int]
    prompt_lens: list[int]
    """Of each sequence."""
    logits_indices: list[int]
    """Rows of the tokens whose successor is chosen: a sequence's last known one, and its draft."""
    scored_indices: list[int]
    """Rows of prompt tokens whose successor in the prompt is scored."""
    scored_token_ids: list[int]
    """Those successors."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computes; nothing on other ranks than 0."""

    logits: torch.Tensor
    """[batch.num_rows, vocab_size] float32 of the tokens that get a successor"""
    prompt_logprobs: list[float]
    """Of the tokens that `ScheduledSequence.num_scored_tokens` counts, sequence after sequence."""


class ModelRunner:
    """Runs steps of one model."""

    def __init__(self, model: CausalLM, device: Device) -> None:
        self._model = model
        self._device = device
        shape = model.attention_shape
        backend = import_entry(ATTENTION_BACKENDS, device.attention, "attention backend")
        if reasons := backend.why_not(shape):
            logger.info("Attention falls back to plain torch: %s", "; ".join(reasons))
            backend = import_entry(ATTENTION_BACKENDS, "torch", "attention backend")
        self._attention: AttentionBackend = backend(shape, BLOCK_SIZE)

    def kv_bytes_per_block(self, dtype: torch.dtype) -> int:
        shape = self._model.attention_shape
        per_token = 2 * self._model.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
        return per_token * BLOCK_SIZE

    def allocate(self, num_blocks: int, dtype: torch.dtype, *, num_positions: int) -> None:
        """Memory for `num_blocks` blocks of KV in `dtype`, and for rotating positions below `num_positions`."""
        device = self._device.torch_device
        caches = [self._attention.allocate(num_blocks, dtype, device) for _ in range(self._model.num_layers)]
        self._model.use_attention(self._attention, caches)
        self._model.rotary.allocate(num_positions)

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute a step."""
        return self.run(self.inputs(batch))

    @torch.inference_mode()
    def run(self, inputs: StepInputs) -> StepResult:
        """The step of `inputs`. Ranks other than 0 make the same calls and have no rows."""
        hidden = self._forward(inputs)
        logits = self._model.compute_logits(hidden[self._tensor(inputs.logits_indices, torch.int64)])
        return StepResult(logits, self._score(hidden, inputs.scored_indices, inputs.scored_token_ids))

    def _score(self, hidden: torch.Tensor, indices: list[int], token_ids: list[int]) -> list[float]:
        """Log-probability of `token_ids[i]` after row `indices[i]` of hidden [num_tokens, hidden_size]."""
        scores: list[float] = []
        for first in range(0, len(indices), SCORED_ROWS):
            rows = self._tensor(indices[first : first + SCORED_ROWS], torch.int64)
            logits = self._model.compute_logits(hidden[rows])
            if len(logits):
                ids = self._tensor(token_ids[first : first + SCORED_ROWS], torch.int64)
                scores += _logprobs(logits, ids).tolist()
        return scores

    @staticmethod
    def inputs(batch: ScheduledBatch) -> StepInputs:
        """What the forward pass needs to know of a scheduled batch."""
        input_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        counts: list[int] = []
        seq_lens: list[int] = []
        logits_indices: list[int] = []
        scored_indices: list[int] = []
        scored_token_ids: list[int] = []
        for scheduled in batch.scheduled:
            sequence, draft, num_scored = scheduled.sequence, scheduled.draft, scheduled.num_scored_tokens
            first, count = sequence.num_computed_tokens, scheduled.num_tokens + len(draft)
            if num_scored:
                next_scored = 1 + len(sequence.prompt_logprobs)
                row = len(input_ids) + next_scored - 1 - first
                scored_indices += range(row, row + num_scored)
                scored_token_ids += sequence.token_ids[next_scored : next_scored + num_scored]
            input_ids += sequence.token_ids[first : first + scheduled.num_tokens] + draft
            positions += range(first, first + count)
            slots += _slots(sequence.block_table, first, count)
            counts.append(count)
            seq_lens.append(first + count)
            if scheduled.is_completing:
                logits_indices += range(len(input_ids) - 1 - len(draft), len(input_ids))
        starts = [0, *itertools.accumulate(counts)]
        return StepInputs(
            input_ids=input_ids,
            positions=positions,
            query_start_loc=starts,
            seq_lens=seq_lens,
            block_table=_padded(scheduled.sequence.block_table for scheduled in batch.scheduled),
            slot_mapping=slots,
            prompt_lens=[scheduled.sequence.num_prompt_tokens for scheduled in batch.scheduled],
            logits_indices=logits_indices,
            scored_indices=scored_indices,
            scored_token_ids=scored_token_ids,
        )

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size]"""
        metadata = AttentionMetadata(
            query_start_loc=self._tensor(inputs.query_start_loc, torch.int32),
            seq_lens=self._tensor(inputs.seq_lens, torch.int32),
            block_table=self._tensor(inputs.block_table, torch.int32),
            slot_mapping=self._tensor(inputs.slot_mapping, torch.int64),
        )
        prepared = self._attention.prepare(metadata)
        rotation = self._model.rotary.prepare(inputs.positions, inputs.query_start_loc, inputs.prompt_lens)
        return self._model.forward(self._tensor(inputs.input_ids, torch.int64), rotation, prepared)

    def _tensor(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device.torch_device, non_blocking=True)


def _logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of one token a row: logits [rows, vocab_size] and token_ids [rows] -> [rows]."""
    return logits.gather(1, token_ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)


def _slots(block_table: list[int], first: int, count: int) -> Iterable[int]:
    return (
        block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for position in range(first, first + count)
    )


def _padded(tables: Iterable[list[int]]) -> list[list[int]]:
    rows = list(tables)
    width = max(map(len, rows))
    return [row + [0] * (width - len(row)) for row in rows]
