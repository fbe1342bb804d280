"""Seconds of any step, predicted from what it computes, with rates that are learnt from the steps so far."""

from __future__ import annotations

import math
from typing import NamedTuple

from engine.scheduling.batch import ScheduledBatch

LEARNING = 0.3
"""Part of a prediction's error that one step takes away."""
MAX_ERROR = 1.0
"""Largest error, relative to the prediction, that a step teaches: others on the machine may have disturbed it."""
TOKENS_PER_ROW = 0.4
"""Before anything is seen, a row of logits counts as so many tokens, ..."""
TOKENS_PER_PROMPT_PAIR = 1 / 2500
"""... a token of a prompt that attends to another one as so many, ..."""
TOKENS_PER_DECODE_PAIR = 1 / 1000
"""... and one that is its sequence's only one as so many."""


class Chunk(NamedTuple):
    """Tokens of a prompt, after `context` others of it."""

    num_tokens: int
    context: int


class StepWork(NamedTuple):
    """Counts that a step's time depends on."""

    num_tokens: int = 0
    num_rows: int = 0
    """Rows of logits."""
    num_prompt_pairs: int = 0
    """Pairs of a token and one that it attends to, where a sequence computes several tokens."""
    num_decode_pairs: int = 0
    """Such pairs where it computes one: its keys and values are read for that one alone."""

    def with_chunk(self, num_tokens: int, context: int) -> StepWork:
        """This and `num_tokens` tokens of a prompt after `context` others."""
        num_pairs = self.num_prompt_pairs + prompt_pairs(num_tokens, context)
        return StepWork(self.num_tokens + num_tokens, self.num_rows, num_pairs, self.num_decode_pairs)


class StepRates(NamedTuple):
    """Seconds of each of `StepWork`'s counts, in their order."""

    token_s: float
    row_s: float
    prompt_pair_s: float
    decode_pair_s: float


def prompt_pairs(num_tokens: int, context: int) -> int:
    """Pairs of `num_tokens` tokens that follow `context` others: each attends to those before it and to itself."""
    return num_tokens * context + num_tokens * (num_tokens + 1) // 2


def work_of(batch: ScheduledBatch) -> StepWork:
    """The work of a scheduled step."""
    num_prompt_pairs = num_decode_pairs = 0
    for scheduled in batch.scheduled:
        num_tokens = scheduled.num_tokens + len(scheduled.draft)
        if num_tokens == 1:
            num_decode_pairs += scheduled.num_computed_tokens + 1
        else:
            num_prompt_pairs += prompt_pairs(num_tokens, scheduled.num_computed_tokens)
    return StepWork(batch.num_tokens, batch.num_rows, num_prompt_pairs, num_decode_pairs)


class StepTimes:
    """A step's time: that of reading the weights and of multiplying with them, and that of attention on top.

    The first two overlap: together they take the root of the sum of their squares, which is close to the longer one
    where they differ much. A step's error changes the rates by their parts in its prediction: what made up most of the
    step is corrected most, and what the step did not have stays as it was. No rate becomes negative.
    """

    def __init__(self, num_tokens: int, few_s: float, many_s: float) -> None:
        """A step of one token took `few_s`, one of `num_tokens` tokens of a prompt `many_s`."""
        token_s = many_s / (num_tokens + TOKENS_PER_ROW)
        relative = 1.0, TOKENS_PER_ROW, TOKENS_PER_PROMPT_PAIR, TOKENS_PER_DECODE_PAIR
        self._read_s = few_s
        self._rates = StepRates(*(token_s * tokens for tokens in relative))

    def seconds(self, work: StepWork) -> float:
        rates = self._rates
        multiplying_s = work.num_tokens * rates.token_s + work.num_rows * rates.row_s
        attending_s = work.num_prompt_pairs * rates.prompt_pair_s + work.num_decode_pairs * rates.decode_pair_s
        return math.hypot(self._read_s, multiplying_s) + attending_s

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step of `work` took `seconds`."""
        token_s, row_s, prompt_pair_s, decode_pair_s = self._rates
        tokens_s, rows_s = token_s * work.num_tokens, row_s * work.num_rows
        prompts_s, decodes_s = prompt_pair_s * work.num_prompt_pairs, decode_pair_s * work.num_decode_pairs
        matrices_s = math.hypot(self._read_s, tokens_s + rows_s)
        part = (tokens_s + rows_s) / matrices_s
        reading_s, tokens_s, rows_s = self._read_s**2 / matrices_s, part * tokens_s, part * rows_s
        predicted = reading_s + tokens_s + rows_s + prompts_s + decodes_s
        error = min(max(seconds - predicted, -MAX_ERROR * predicted), MAX_ERROR * predicted)
        scale = LEARNING * error / (reading_s**2 + tokens_s**2 + rows_s**2 + prompts_s**2 + decodes_s**2)

        def factor(part_s: float) -> float:
            return max(0.5, 1 + scale * part_s)

        self._read_s *= factor(reading_s)
        self._rates = StepRates(
            token_s * factor(tokens_s),
            row_s * factor(rows_s),
            prompt_pair_s * factor(prompts_s),
            decode_pair_s * factor(decodes_s),
        )
