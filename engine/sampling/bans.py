"""Tokens that may not come next: their logits become -inf. Before a length, after certain tokens, or all but some.

Few tokens are biases, which a backend of the penalties adds. A row of which little is allowed is filled as a whole: so
many biases would take the memory of the logits several times.
"""

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
from quant.kernels.transfer import to_device


class Bans:
    """Bans tokens in a step; keeps what is allowed to the sequences that have a list, on the device."""

    def __init__(self, eos_token_ids: SequenceOf[int], backend: str = "torch") -> None:
        """`backend` is a key of `PENALTIES`: a ban is a bias."""
        self._eos_token_ids = list(eos_token_ids)
        self._adjust_logits: AdjustLogits = import_entry(PENALTIES, backend, "penalty")
        self._allowed: WeakKeyDictionary[Sequence, torch.Tensor] = WeakKeyDictionary()

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
            if scheduled.sequence.request.sampling.allowed_token_ids:
                allowed = self._allowed_ids(scheduled.sequence, logits.device)
                for row in scheduled.rows:
                    _keep(logits[row], allowed)
            for row, token_ids in self._banned(scheduled):
                biases = np.full(len(token_ids), -np.inf, np.float32)
                places.append(Places(np.full(len(token_ids), row), token_ids, biases=biases))
        if places:
            self._adjust_logits(logits, Adjustments([], 0.0, Places.join(places)))

    def _banned(self, scheduled: ScheduledSequence) -> Iterator[tuple[int, Integers]]:
        """Each row and its banned tokens, in ascending order, beside those that are not in a list."""
        sequence, request = scheduled.sequence, scheduled.sequence.request
        output = [*sequence.token_ids[sequence.num_prompt_tokens :], *scheduled.draft]
        for row, length in zip(scheduled.rows, range(len(output) - len(scheduled.draft), len(output) + 1), strict=True):
            token_ids = [banned[-1] for banned in request.banned_sequences if _ends_with(output, length, banned)]
            if length < _min_tokens(sequence):
                token_ids += [*self._eos_token_ids, *request.stop_token_ids]
            if token_ids:
                yield row, np.unique(np.array(token_ids, np.int64))

    def _allowed_ids(self, sequence: Sequence, device: torch.device) -> torch.Tensor:
        """[allowed tokens] int64, on the device."""
        allowed = self._allowed.get(sequence)
        if allowed is None:
            allowed = to_device(np.unique(np.array(sequence.request.sampling.allowed_token_ids, np.int64)), device)
            self._allowed[sequence] = allowed
        return allowed


def _keep(row: torch.Tensor, allowed: torch.Tensor) -> None:
    """Ban all tokens of a row of logits [vocab] but the allowed ones, in place."""
    kept = row.index_select(0, allowed)
    row.fill_(-torch.inf)
    row.index_copy_(0, allowed, kept)


def _ends_with(output: list[int], length: int, banned: list[int]) -> bool:
    """Whether the first `length` tokens of an output end with all but the last of `banned`."""
    num_before = len(banned) - 1
    if not num_before:
        return True
    is_near = length >= num_before and output[length - 1] == banned[-2]  # most often that is all there is to compare
    return is_near and output[length - num_before : length] == banned[:-1]


def _is_banning(sequence: Sequence) -> bool:
    request = sequence.request
    is_short = sequence.num_output_tokens < _min_tokens(sequence)
    return is_short or bool(request.banned_sequences) or bool(request.sampling.allowed_token_ids)


def _min_tokens(sequence: Sequence) -> int:
    """Tokens before which the sequence may not end; where a grammar says when the output is complete, none."""
    return 0 if sequence.grammar is not None else sequence.request.sampling.min_tokens
