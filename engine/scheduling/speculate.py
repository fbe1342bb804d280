"""Speculation: guess a sequence's next tokens, so that one step can check several of them.

A draft's tokens are just more tokens of the step. The model's own choice at each of them is sampled as always; as long
as it equals the draft, the next choice counts as well. What is drawn at a position depends on the request's seed and
the position alone (`engine.sampling.sampler`), so a draft changes when a token is found and never which. This is the
acceptance rule of Leviathan et al. 2023 for a draft that is certain of itself: a drafted token is kept with the
probability that the model gives it, and what replaces it is distributed as the model's other tokens.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np

from engine.scheduling.proposal import MAX_MATCH, IntArray, Proposal
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_costs import StepCosts

MIN_GAIN = 1.02
"""Factor by which a draft must raise a step's tokens per second: predictions are not exact."""
PRIOR_ACCEPTANCE = 0.3, 0.9
"""Acceptance of a token drafted after a match of 1 and of `MAX_MATCH` tokens, before anything was seen."""
PRIOR_WEIGHT = 8.0
"""Drafted tokens that the prior acceptance counts as."""
FORGETTING = 0.95
"""Factor by which a request's counts shrink at each new token."""
SHARED_WEIGHT = 4.0
"""Drafted tokens that all requests' acceptance counts as beside a request's."""


class Proposer(Protocol):
    """A guess from the tokens alone."""

    def __call__(self, token_ids: IntArray, max_tokens: int) -> Proposal:
        """At most `max_tokens` tokens that may follow `token_ids` [n]; none where it has no guess."""


class Drafter(Protocol):
    """Decides the drafts of each step, and learns from what became of them."""

    num_drafts: int
    """Since the start: how often a sequence had a draft in a step."""
    num_drafted: int
    """Since the start: tokens of drafts."""
    num_accepted: int
    """Since the start: tokens of drafts that were the model's own choice."""

    def draft(self, sequences: SequenceOf[Sequence], rooms: SequenceOf[int], budget: int) -> list[list[int]]:
        """A draft for each sequence, of `rooms[i]` tokens at most and `budget` together; it may be empty."""

    def observe(self, sequence: Sequence, draft: SequenceOf[int], new_token_ids: SequenceOf[int]) -> None:
        """The model has chosen `new_token_ids` where `draft` was checked."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended; it may never have been seen."""


class NoDrafter:
    """Drafts nothing."""

    num_drafts = num_drafted = num_accepted = 0

    def draft(self, sequences: SequenceOf[Sequence], rooms: SequenceOf[int], budget: int) -> list[list[int]]:
        return [[] for _ in sequences]

    def observe(self, sequence: Sequence, draft: SequenceOf[int], new_token_ids: SequenceOf[int]) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass


class Acceptance:
    """How often a drafted token is the model's choice, over all requests, by the length of the match before it."""

    def __init__(self) -> None:
        low, high = PRIOR_ACCEPTANCE
        grid = np.linspace(0.0, 1.0, MAX_MATCH)
        self._accepted = PRIOR_WEIGHT * (low + (high - low) * grid)
        self._drafted = np.full(MAX_MATCH, PRIOR_WEIGHT)

    def rate(self, match_length: int) -> float:
        index = min(match_length, MAX_MATCH) - 1
        return float(self._accepted[index] / self._drafted[index])

    def observe(self, match_length: int, *, is_accepted: bool) -> None:
        index = min(match_length, MAX_MATCH) - 1
        self._accepted[index] += is_accepted
        self._drafted[index] += 1


@dataclasses.dataclass(slots=True)
class _Drafting:
    """One sequence's tokens as an array, its last proposal, and its counts, which forget."""

    token_ids: array[int]
    proposal: Proposal = dataclasses.field(default_factory=lambda: Proposal([], 0))
    accepted: float = 0.0
    drafted: float = 0.0

    def rate(self, shared: float) -> float:
        return (SHARED_WEIGHT * shared + self.accepted) / (SHARED_WEIGHT + self.drafted)


class Speculator:
    """Drafts what pays: the likeliest tokens of all proposals, as many as make the step worth more than its time.

    A proposal is made for every decoding sequence, whether or not it is used: its tokens are compared with those that
    the model chooses, so that a request which drafts nothing is noticed when that begins to pay.
    """

    def __init__(self, propose: Proposer, costs: StepCosts, max_draft_tokens: int) -> None:
        self._propose = propose
        self._costs = costs
        self._max_draft_tokens = max_draft_tokens
        self._acceptance = Acceptance()
        self._drafting: dict[Sequence, _Drafting] = {}
        self.num_drafts = 0
        self.num_drafted = 0
        self.num_accepted = 0

    def draft(self, sequences: SequenceOf[Sequence], rooms: SequenceOf[int], budget: int) -> list[list[int]]:
        candidates: list[tuple[float, int]] = []
        for index, (sequence, room) in enumerate(zip(sequences, rooms, strict=True)):
            drafting = self._updated(sequence)
            tokens = np.frombuffer(drafting.token_ids, np.int32)
            # One token at least, to be compared with what comes.
            drafting.proposal = self._proposal(sequence, tokens, max(1, min(room, self._max_draft_tokens)))
            chance = 1.0
            for offset in range(min(room, len(drafting.proposal.token_ids))):
                chance *= drafting.rate(self._acceptance.rate(drafting.proposal.match_length + offset))
                candidates.append((chance, index))
        candidates.sort(key=lambda candidate: -candidate[0])
        num_chosen = self._worthwhile([chance for chance, _ in candidates[:budget]], len(sequences))
        lengths = [0] * len(sequences)
        for _, index in candidates[:num_chosen]:
            lengths[index] += 1
        drafts = (self._drafting[sequence].proposal.token_ids for sequence in sequences)
        return [tokens[:length] for tokens, length in zip(drafts, lengths, strict=True)]

    def _proposal(self, sequence: Sequence, token_ids: IntArray, max_tokens: int) -> Proposal:
        """The text that the sequence's grammar forces, rated as the longest match, or what it allows of a guess."""
        grammar = sequence.grammar
        if grammar is None:
            return self._propose(token_ids, max_tokens)
        if forced := grammar.forced():
            return Proposal(forced[:max_tokens], MAX_MATCH)
        proposal = self._propose(token_ids, max_tokens)
        return Proposal(proposal.token_ids[: grammar.count_allowed(proposal.token_ids)], proposal.match_length)

    def _worthwhile(self, chances: SequenceOf[float], num_sequences: int) -> int:
        """Count of drafted tokens, the likeliest first, that gives the most tokens per second."""
        best, best_rate = 0, num_sequences / self._costs.seconds(num_sequences) * MIN_GAIN
        expected = float(num_sequences)
        for count, chance in enumerate(chances, start=1):
            expected += chance
            rate = expected / self._costs.seconds(num_sequences + count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _updated(self, sequence: Sequence) -> _Drafting:
        drafting = self._drafting.get(sequence)
        if drafting is None:
            drafting = self._drafting[sequence] = _Drafting(array("i"))
        drafting.token_ids.extend(sequence.token_ids[len(drafting.token_ids) :])
        return drafting

    def observe(self, sequence: Sequence, draft: SequenceOf[int], new_token_ids: SequenceOf[int]) -> None:
        if draft:
            self.num_drafts += 1
            self.num_drafted += len(draft)
            self.num_accepted += max(0, len(new_token_ids) - 1)
        drafting = self._drafting.get(sequence)
        if drafting is None:
            return
        proposal = drafting.proposal
        for offset, (guess, token_id) in enumerate(zip(proposal.token_ids, new_token_ids, strict=False)):
            is_accepted = guess == token_id
            self._acceptance.observe(proposal.match_length + offset, is_accepted=is_accepted)
            drafting.accepted = FORGETTING * drafting.accepted + is_accepted
            drafting.drafted = FORGETTING * drafting.drafted + 1
            if not is_accepted:
                break
        drafting.proposal = Proposal([], 0)

    def forget(self, sequence: Sequence) -> None:
        self._drafting.pop(sequence, None)
