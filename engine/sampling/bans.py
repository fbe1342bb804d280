"""Tokens that may not come next: their logits become -inf. Before a length, after certain tokens, or all but some."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

import numpy as np
import torch

from engine.link.registry import import_entry
from engine.sampling.penalties import PENALTIES, AdjustLogits, Adjustments, Integers, Places
from engine.scheduling.batch import ScheduledBatch, ScheduledSequence
from engine.scheduling.sequence import Sequence


class Bans:
    """Bans tokens in a step; keeps what is not allowed to the sequences that have a list of allowed tokens."""

    def __init__(self, eos_token_ids: SequenceOf[int], backend: str = "torch") -> None:
        """`backend` is a key of `PENALTIES`: a ban is a bias."""
        self._eos_token_ids = list(eos_token_ids)
        self._adjust_logits: AdjustLogits = import_entry(PENALTIES, backend, "penalty")
        self._others: WeakKeyDictionary[Sequence, Integers] = WeakKeyDictionary()

    @staticmethod
    def needs_tokens(sequence: Sequence) -> bool:
        """True where a ban depends on the tokens before it."""
        return any(len(token_ids) > 1 for token_ids in sequence.request.banned_sequences)

    @staticmethod
    def select(batch: ScheduledBatch) -> list[ScheduledSequence]:
        """The sequences that have rows in this step and may have bans."""
        return [s for s in batch.scheduled if s.is_completing and _is_banning(s.sequence)]

    @torch.inference_mode()
    def apply(self, selected: SequenceOf[ScheduledSequence], logits: torch.Tensor) -> None:
        """Ban tokens in the selected sequences' rows of logits [all rows, vocab] float32, in place."""
        places = []
        for scheduled in selected:
            for row, token_ids in self._banned(scheduled, logits.shape[1]):
                biases = np.full(len(token_ids), -np.inf, np.float32)
                places.append(Places(np.full(len(token_ids), row), token_ids, biases=biases))
        if places:
            self._adjust_logits(logits, Adjustments([], 0.0, Places.join(places)))

    def _banned(self, scheduled: ScheduledSequence, vocab_size: int) -> Iterator[tuple[int, Integers]]:
        """Each row and its banned tokens, in ascending order."""
        sequence, request = scheduled.sequence, scheduled.sequence.request
        output = [*sequence.token_ids[sequence.num_prompt_tokens :], *scheduled.draft]
        others = self._not_allowed(sequence, vocab_size)
        for row, length in zip(scheduled.rows, range(len(output) - len(scheduled.draft), len(output) + 1), strict=True):
            token_ids = [
                banned[-1]
                for banned in request.banned_sequences
                if banned[:-1] == output[max(0, length - len(banned) + 1) : length]
            ]
            if length < _min_tokens(sequence):
                token_ids += [*self._eos_token_ids, *request.stop_token_ids]
            yield row, np.union1d(others, np.array(token_ids, np.int64))

    def _not_allowed(self, sequence: Sequence, vocab_size: int) -> Integers:
        allowed = sequence.request.sampling.allowed_token_ids
        if not allowed:
            return np.empty(0, np.int64)
        others = self._others.get(sequence)
        if others is None:
            others = np.setdiff1d(np.arange(vocab_size), np.array(allowed, np.int64))
            self._others[sequence] = others
        return others


def _is_banning(sequence: Sequence) -> bool:
    request = sequence.request
    is_short = sequence.num_output_tokens < _min_tokens(sequence)
    return is_short or bool(request.banned_sequences) or bool(request.sampling.allowed_token_ids)


def _min_tokens(sequence: Sequence) -> int:
    """Tokens before which the sequence may not end; where a grammar says when the output is complete, none."""
    return 0 if sequence.grammar is not None else sequence.request.sampling.min_tokens
