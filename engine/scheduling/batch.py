"""The decision of one step, and the tokens that come of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from engine.scheduling.sequence import Sequence


class ScheduledSequence(NamedTuple):
    """One sequence's part in a step, decided when the sequence stood as the scheduler saw it."""

    sequence: Sequence
    num_computed_tokens: int
    """Tokens whose KV was there before the step."""
    num_tokens: int
    """Tokens that the step computes, beside those of the draft."""
    draft: list[int]
    """Tokens that may follow the last known one; they are computed after it and checked."""
    is_completing: bool
    """The step computes the last known token, so that the sequence gets a next one."""
    num_scored_tokens: int
    """Tokens of the prompt that get their logprob by this step.

    They go on from where `Sequence.prompt_logprobs` ends: a token that is computed again after a preemption is not
    scored again.
    """
    rows: range
    """Rows of the step's logits: one for the next token and one more for each drafted token; empty unless completing.

    The row at index i chooses the output token at position `sequence.num_output_tokens + i`.
    """


@dataclasses.dataclass(slots=True)
class ScheduledBatch:
    """One step's decision."""

    scheduled: list[ScheduledSequence] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    """Tokens that the step computes, drafts included."""
    num_rows: int = 0
    """Rows of logits that the step computes for next tokens; scored tokens of prompts have none."""
    num_prompt_top_tokens: int = 0
    """Likeliest tokens that are found for each scored token: as many as the sequence wants that wants most."""
    has_prompt_ranks: bool = False
    """Ranks are found for each scored token, since a sequence wants those of its own."""
    block_copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """KV blocks that are copied before anything is computed: from, to. All are read before one is written."""
    num_admitted: int = 0
    """Sequences that left the queue for this step."""
    is_decoding: bool = True
    """Every sequence computes one known token, and maybe a draft."""
    is_launched: bool = False
    """Its sequences stand as they will after the step, but for the tokens that it chooses (`Scheduler.advance`)."""

    def add(self, sequence: Sequence, num_tokens: int, draft: list[int] | None = None) -> None:
        """Compute `num_tokens` more known tokens of `sequence`, and its draft if all of them are computed by that."""
        draft = draft or []
        is_completing = num_tokens == sequence.num_uncomputed_tokens
        end = self.num_rows + (1 + len(draft) if is_completing else 0)
        num_scored = sequence.num_unscored_tokens
        if num_scored:
            num_new_scores = sequence.num_computed_tokens + num_tokens - len(sequence.prompt_logprobs)
            num_scored = max(0, min(num_scored, num_new_scores))
        if num_scored:
            self.num_prompt_top_tokens = max(self.num_prompt_top_tokens, sequence.request.num_prompt_top_tokens)
            self.has_prompt_ranks |= sequence.request.has_prompt_ranks
        self.scheduled.append(
            ScheduledSequence(
                sequence,
                sequence.num_computed_tokens,
                num_tokens,
                draft,
                is_completing,
                num_scored_tokens=num_scored,
                rows=range(self.num_rows, end),
            )
        )
        if sequence.block_copy is not None:
            self.block_copies.append(sequence.block_copy)
        self.num_tokens += num_tokens + len(draft)
        self.num_rows = end
        self.is_decoding = self.is_decoding and num_tokens == 1


@dataclasses.dataclass(frozen=True, slots=True)
class SampledBatch:
    """The sampler's choice for each row of the step's logits."""

    token_ids: list[int]
    logprobs: list[float]
    is_finite: list[bool]
    top_token_ids: list[list[int]] = dataclasses.field(default_factory=list)
    """For each row the likeliest tokens, none where the request has none; empty if that holds for all rows."""
    top_logprobs: list[list[float]] = dataclasses.field(default_factory=list)
    """The logprobs of `top_token_ids`, in the same lists."""
