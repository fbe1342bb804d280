"""Penalties, biases and the watermark: they change a step's logits by the request's parameters and its tokens so far.

The order is TGI's, then OpenAI's: watermark, repetition penalty, TGI's relative frequency penalty, OpenAI's frequency
and presence penalties, logit_bias. Each row depends on the tokens of its own sequence alone, never on padding or on who
else is in the step. A row of a draft has the tokens of the draft before it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from engine.link.messages import SamplingParams
from engine.scheduling.batch import ScheduledBatch, ScheduledSequence
from engine.scheduling.sequence import Sequence

WATERMARK_KEY = 15485863
"""TGI's hash key: its product with the previous token seeds the choice of the green list."""

Integers = npt.NDArray[np.int64]


def is_counting(params: SamplingParams) -> bool:
    """True if a token's logit depends on how often it is there."""
    return (
        params.repetition_penalty != 1.0
        or params.relative_frequency_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def is_adjusting(params: SamplingParams) -> bool:
    """True if the request wants its logits changed at all."""
    return is_counting(params) or params.is_watermarked or bool(params.logit_bias)


class TokenCounts:
    """How often each token is in a sequence and in its output; tokens are added as they come, a draft's removed again.

    Three columns have a place for each distinct token, in the order in which tokens were first seen.
    """

    def __init__(self, prompt_token_ids: list[int]) -> None:
        ids, counts = np.unique(np.array(prompt_token_ids, np.int64), return_counts=True)
        self._token_ids = array("q", ids.tobytes())
        self._in_all = array("q", counts.astype(np.int64).tobytes())
        self._in_output = array("q", bytes(ids.nbytes))
        self._place_of = {token_id: place for place, token_id in enumerate(ids.tolist())}
        self.num_tokens = len(prompt_token_ids)

    def add(self, token_id: int) -> None:
        """Count one more token of output."""
        place = self._place_of.setdefault(token_id, len(self._token_ids))
        if place == len(self._token_ids):
            self._token_ids.append(token_id)
            self._in_all.append(0)
            self._in_output.append(0)
        self._in_all[place] += 1
        self._in_output[place] += 1
        self.num_tokens += 1

    def remove(self, token_id: int) -> None:
        """Take back the token that was added last."""
        place = self._place_of[token_id]
        self._in_all[place] -= 1
        self._in_output[place] -= 1
        self.num_tokens -= 1
        if not self._in_all[place]:  # then it was new, and its place is the last one
            del self._place_of[token_id], self._token_ids[place], self._in_all[place], self._in_output[place]

    def columns(self) -> tuple[Integers, Integers, Integers]:
        """Copies [distinct tokens]: token ids, their counts in prompt and output, their counts in the output."""
        return np.array(self._token_ids), np.array(self._in_all), np.array(self._in_output)


class Penalties:
    """Adjusts the logits of a step; keeps the counts of the sequences that want them for as long as they live."""

    def __init__(self, watermark_gamma: float = 0.5, watermark_delta: float = 2.0) -> None:
        """`watermark_gamma` is the part of the vocabulary on the green list, which gains `watermark_delta`."""
        self._watermark_gamma = watermark_gamma
        self._watermark_delta = watermark_delta
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()

    @staticmethod
    def needs_tokens(sequence: Sequence) -> bool:
        """True for penalties that count, and for a watermark, which depends on the last token."""
        params = sequence.request.sampling
        return is_counting(params) or params.is_watermarked

    @staticmethod
    def select(batch: ScheduledBatch) -> list[ScheduledSequence]:
        """The sequences that have rows in this step and want them adjusted."""
        return [s for s in batch.scheduled if s.is_completing and is_adjusting(s.sequence.request.sampling)]

    @torch.inference_mode()
    def apply(self, selected: SequenceOf[ScheduledSequence], logits: torch.Tensor) -> None:
        """Adjust the selected sequences' rows of logits [all rows, vocab] float32 in place."""
        counted, biased = _Places(), _Places()
        for scheduled in selected:
            sequence = scheduled.sequence
            params = sequence.request.sampling
            if params.is_watermarked:
                for row, previous in zip(scheduled.rows, [sequence.token_ids[-1], *scheduled.draft], strict=True):
                    logits[row, self._green_list(previous, logits.shape[1])] += self._watermark_delta
            if is_counting(params):
                self._count(scheduled, counted)
            if params.logit_bias:
                token_ids = np.array([*params.logit_bias], np.int64)
                biases = np.array([*params.logit_bias.values()], np.float32)
                for row in scheduled.rows:
                    biased.add(row, token_ids, biases)
        if counted:
            places = counted.indices(logits.device)
            penalties, subtracted = counted.numbers(logits.device)
            values = logits[places]
            logits[places] = torch.where(values < 0, values * penalties, values / penalties) - subtracted
        if biased:
            (biases_of_all,) = biased.numbers(logits.device)
            logits[biased.indices(logits.device)] += biases_of_all

    def _green_list(self, previous: int, vocab_size: int) -> torch.Tensor:
        """Token ids [int(vocab_size * gamma)], on any device those that TGI draws on a CPU."""
        generator = torch.Generator().manual_seed(WATERMARK_KEY * previous)
        return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * self._watermark_gamma)]

    def _count(self, scheduled: ScheduledSequence, counted: _Places) -> None:
        """Add the penalties of the sequence's rows to `counted`."""
        sequence = scheduled.sequence
        params = sequence.request.sampling
        counts = self._counts.get(sequence)
        if counts is None:
            counts = self._counts[sequence] = TokenCounts(sequence.request.prompt_token_ids)
        for token_id in sequence.token_ids[counts.num_tokens :]:
            counts.add(token_id)
        for row, following in zip(scheduled.rows, [*scheduled.draft, None], strict=True):
            token_ids, in_all, in_output = counts.columns()
            subtracted = (
                params.relative_frequency_penalty / counts.num_tokens * in_all
                + params.frequency_penalty * in_output
                + params.presence_penalty * (in_output > 0)
            )
            counted.add(row, token_ids, np.full(len(token_ids), params.repetition_penalty), subtracted)
            if following is not None:
                counts.add(following)
        for token_id in reversed(scheduled.draft):
            counts.remove(token_id)


class _Places:
    """Places in a step's logits, each at most once, with numbers for each; gathered row by row, used all at once."""

    def __init__(self) -> None:
        self._rows: list[Integers] = []
        self._token_ids: list[Integers] = []
        self._numbers: list[tuple[npt.NDArray[Any], ...]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, token_ids: Integers, *numbers: npt.NDArray[Any]) -> None:
        """Add one row's places: token_ids [n], and for each kind of number an array [n]."""
        self._rows.append(np.full(len(token_ids), row))
        self._token_ids.append(token_ids)
        self._numbers.append(numbers)

    def indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns [all places] int64."""
        rows, columns = np.concatenate(self._rows), np.concatenate(self._token_ids)
        return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)

    def numbers(self, device: torch.device) -> list[torch.Tensor]:
        """Each kind of number [all places] float32."""
        kinds = zip(*self._numbers, strict=True)
        return [torch.from_numpy(np.concatenate(kind).astype(np.float32)).to(device) for kind in kinds]
