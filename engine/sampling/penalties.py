"""Penalties, biases and the watermark: they change a step's logits by the request's parameters and its tokens so far.

The order is TGI's, then OpenAI's: watermark, repetition penalty, TGI's relative frequency penalty, OpenAI's frequency
and presence penalties, logit_bias. Each row depends on the tokens of its own sequence alone, never on padding or on who
else is in the step. A row of a draft has the tokens of the draft before it. What to change is found out here; a backend
(`PENALTIES`) changes it, where the logits are.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from engine.link.messages import SamplingParams
from engine.link.registry import import_entry
from engine.scheduling.batch import ScheduledBatch, ScheduledSequence
from engine.scheduling.sequence import Sequence

PENALTIES: dict[str, str] = {
    "torch": "engine.sampling.penalties_torch:adjust_logits",
    "triton": "engine.sampling.penalties_triton:adjust_logits",
}
"""Backend name -> lazy "module:function", an `AdjustLogits`.

`torch` is the reference implementation, runs anywhere, and is what a CPU takes: few places change in a step.
"""

WATERMARK_KEY = 15485863
"""TGI's hash key: its product with the previous token seeds the choice of the green list."""

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """Places in a step's logits, each at most once, and what makes their new values: arrays [places].

    A value below 0 is multiplied by the penalty, another one divided by it; less what is subtracted, plus the bias.
    """

    rows: Integers
    token_ids: Integers
    penalties: Floats | None = None
    """None: 1 everywhere."""
    subtracted: Floats | None = None
    """None where there are no penalties."""
    biases: Floats | None = None
    """None: 0 everywhere."""

    @classmethod
    def join(cls, parts: SequenceOf[Places]) -> Places:
        """All places of at least one part."""
        return cls(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.token_ids for part in parts]),
            _join(parts, [part.penalties for part in parts], neutral=1.0),
            _join(parts, [part.subtracted for part in parts], neutral=0.0),
            _join(parts, [part.biases for part in parts], neutral=0.0),
        )


def _join(parts: SequenceOf[Places], arrays: list[Floats | None], *, neutral: float) -> Floats | None:
    """One kind of number of all parts; None where no part has any."""
    if all(array is None for array in arrays):
        return None
    return np.concatenate([filled(array, len(part.rows), neutral) for part, array in zip(parts, arrays, strict=True)])


def filled(numbers: Floats | None, count: int, neutral: float) -> Floats:
    """The numbers [count]; where there are none, the one that changes nothing."""
    return np.full(count, neutral, np.float32) if numbers is None else numbers


@dataclasses.dataclass(frozen=True, slots=True)
class GreenList:
    """The tokens that a watermark favours in one row."""

    row: int
    token_ids: Integers
    """[part of the vocabulary]"""


@dataclasses.dataclass(frozen=True, slots=True)
class Adjustments:
    """What changes in a step's logits: first the green lists, then the places, each at most once."""

    green_lists: list[GreenList]
    green_gain: float
    """What is added to the logits of the green lists."""
    places: Places | None
    """None: there are none."""


class AdjustLogits(Protocol):
    """Changes a step's logits."""

    def __call__(self, logits: torch.Tensor, adjustments: Adjustments) -> None:
        """Change logits [all rows, vocab] float32 in place. Nothing is read back from the device."""


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


class Biases:
    """A request's biases as arrays [biases], by ascending token id: tens of thousands are not gone through again."""

    def __init__(self, logit_bias: Mapping[int, float]) -> None:
        """`logit_bias` has one token at least."""
        token_ids = np.array([*logit_bias], np.int64)
        order = np.argsort(token_ids)
        self.token_ids = token_ids[order]
        self.values = np.array([*logit_bias.values()], np.float32)[order]

    def of(self, token_ids: Integers) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """The bias of each of `token_ids`, 0 without one; and which of the biases [biases] belong to other tokens."""
        places = np.minimum(np.searchsorted(self.token_ids, token_ids), len(self.token_ids) - 1)
        is_biased = self.token_ids[places] == token_ids
        is_other = np.ones(len(self.token_ids), bool)
        is_other[places[is_biased]] = False
        return np.where(is_biased, self.values[places], np.float32(0.0)), is_other


class Penalties:
    """Adjusts the logits of a step; keeps counts and biases of the sequences that have them as long as they live."""

    def __init__(self, watermark_gamma: float = 0.5, watermark_delta: float = 2.0, backend: str = "torch") -> None:
        """`watermark_gamma` is the part of the vocabulary on the green list, which gains `watermark_delta`.

        `backend` is a key of `PENALTIES`.
        """
        self._adjust_logits: AdjustLogits = import_entry(PENALTIES, backend, "penalty")
        self._watermark_gamma = watermark_gamma
        self._watermark_delta = watermark_delta
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()
        self._biases: WeakKeyDictionary[Sequence, Biases] = WeakKeyDictionary()

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
        green_lists: list[GreenList] = []
        places: list[Places] = []
        for scheduled in selected:
            sequence = scheduled.sequence
            params = sequence.request.sampling
            if params.is_watermarked:
                for row, previous in zip(scheduled.rows, [sequence.token_ids[-1], *scheduled.draft], strict=True):
                    green_lists.append(GreenList(row, self._green_token_ids(previous, logits.shape[1])))
            if is_counting(params):
                places += self._counted(scheduled)
            elif params.logit_bias:
                biases = self._biases_of(sequence)
                places += [_biased(row, biases.token_ids, biases.values) for row in scheduled.rows]
        joined = Places.join(places) if places else None
        self._adjust_logits(logits, Adjustments(green_lists, self._watermark_delta, joined))

    def _green_token_ids(self, previous: int, vocab_size: int) -> Integers:
        """Token ids [int(vocab_size * gamma)], on any device those that TGI draws on a CPU."""
        generator = torch.Generator().manual_seed(WATERMARK_KEY * previous)
        token_ids: Integers = torch.randperm(vocab_size, generator=generator).numpy()
        return token_ids[: int(vocab_size * self._watermark_gamma)]

    def _biases_of(self, sequence: Sequence) -> Biases:
        biases = self._biases.get(sequence)
        if biases is None:
            biases = self._biases[sequence] = Biases(sequence.request.sampling.logit_bias)
        return biases

    def _counted(self, scheduled: ScheduledSequence) -> Iterator[Places]:
        """The places of each row of a sequence whose tokens count."""
        sequence = scheduled.sequence
        counts = self._counts.get(sequence)
        if counts is None:
            counts = self._counts[sequence] = TokenCounts(sequence.request.prompt_token_ids)
        for token_id in sequence.token_ids[counts.num_tokens :]:
            counts.add(token_id)
        biases = self._biases_of(sequence) if sequence.request.sampling.logit_bias else None
        for row, following in zip(scheduled.rows, [*scheduled.draft, None], strict=True):
            yield _penalized(row, counts, sequence.request.sampling, biases)
            if following is not None:
                counts.add(following)
        for token_id in reversed(scheduled.draft):
            counts.remove(token_id)


def _penalized(row: int, counts: TokenCounts, params: SamplingParams, biases: Biases | None) -> Places:
    """The places of a row: those of the tokens that are counted, and of the others that have a bias."""
    token_ids, in_all, in_output = counts.columns()
    subtracted = (
        params.relative_frequency_penalty / counts.num_tokens * in_all
        + params.frequency_penalty * in_output
        + params.presence_penalty * (in_output > 0)
    ).astype(np.float32)
    penalties = np.full(len(token_ids), params.repetition_penalty, np.float32)
    if biases is None:
        return Places(np.full(len(token_ids), row), token_ids, penalties, subtracted)
    added, is_other = biases.of(token_ids)
    counted = Places(np.full(len(token_ids), row), token_ids, penalties, subtracted, added)
    return Places.join([counted, _biased(row, biases.token_ids[is_other], biases.values[is_other])])


def _biased(row: int, token_ids: Integers, biases: Floats) -> Places:
    return Places(np.full(len(token_ids), row), token_ids, biases=biases)
