"""The decision of one step, and what the sampler makes of it."""

from __future__ import annotations

import dataclasses
import itertools

from engine.scheduling.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's decision: `num_scheduled_tokens[i]` more tokens of `sequences[i]`, and after them its draft.

    A draft are tokens that may follow the last one known; they are computed with it and checked. `draft_token_ids` has
    one for each sequence, or is empty where nobody has any.
    """

    sequences: list[Sequence]
    num_scheduled_tokens: list[int]
    draft_token_ids: list[list[int]] = dataclasses.field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled_tokens) + sum(map(len, self.draft_token_ids))

    @property
    def drafts(self) -> list[list[int]]:
        """One for each sequence."""
        return self.draft_token_ids or [[] for _ in self.sequences]

    @property
    def is_completing(self) -> list[bool]:
        """For each sequence whether its last token is computed by this step, so that it gets a next one."""
        scheduled = zip(self.sequences, self.num_scheduled_tokens, strict=True)
        return [count == sequence.num_uncomputed_tokens for sequence, count in scheduled]

    @property
    def num_scored_tokens(self) -> list[int]:
        """For each sequence how many tokens of its prompt get their logprob by this step.

        They go on from where `Sequence.prompt_logprobs` ends: what is computed again after a preemption is not scored
        again.
        """
        return [
            max(
                0,
                min(
                    sequence.num_unscored_tokens,
                    sequence.num_computed_tokens + count - len(sequence.prompt_logprobs),
                ),
            )
            for sequence, count in zip(self.sequences, self.num_scheduled_tokens, strict=True)
        ]

    @property
    def sampled(self) -> list[Sequence]:
        """For each row of logits its sequence: one for the next token, one more for each token of a draft."""
        completing = itertools.compress(zip(self.sequences, self.drafts, strict=True), self.is_completing)
        return [sequence for sequence, draft in completing for _ in range(1 + len(draft))]

    @property
    def sampled_positions(self) -> list[int]:
        """For each row of logits which of its sequence's output tokens is chosen there."""
        completing = itertools.compress(zip(self.sequences, self.drafts, strict=True), self.is_completing)
        return [sequence.num_output_tokens + index for sequence, draft in completing for index in range(1 + len(draft))]


@dataclasses.dataclass(frozen=True, slots=True)
class SampledBatch:
    """What the sampler made of the rows of `ScheduledBatch.sampled`, in that order."""

    token_ids: list[int]
    logprobs: list[float]
    is_finite: list[bool]
    top_token_ids: list[list[int]] = dataclasses.field(default_factory=list)
    """One list for each row, empty where none were asked for; likewise their logprobs."""
    top_logprobs: list[list[float]] = dataclasses.field(default_factory=list)
