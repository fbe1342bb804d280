"""Builders for the scheduler's tests, and a runner that computes no numbers but remembers what lies in every slot."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import msgspec

from engine.link.messages import GenerationRequest, TokenEvent
from engine.scheduling.batch import SampledBatch, ScheduledBatch
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.proposal import IntArray, Proposal
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import UNKNOWN_TOKEN, Sequence
from engine.scheduling.speculate import Proposer, Speculator
from engine.scheduling.step_costs import StepCosts
from engine.scheduling.step_times import Chunk

EOS = 7
PrefixKey = tuple[int, ...]


def make_request(request_id: str, prompt: list[int], max_new_tokens: int = 4) -> GenerationRequest:
    return GenerationRequest(request_id=request_id, prompt_token_ids=prompt, max_new_tokens=max_new_tokens)


def next_token(token_ids: list[int]) -> int:
    """A model: the next token is a function of all tokens so far; one in twenty is EOS."""
    return zlib.crc32(bytes(token_ids)) % 20


def expected_output(request: GenerationRequest, model: Callable[[list[int]], int] = next_token) -> list[int]:
    """What the request must get when it runs to its end, whatever else runs."""
    token_ids = list(request.prompt_token_ids)
    output: list[int] = []
    while len(output) < request.max_new_tokens and output[-1:] != [EOS]:
        output.append(model(token_ids + output))
    return output


def expected_scores(request: GenerationRequest) -> list[float]:
    """Logprobs of a prompt's tokens from the second on."""
    return [-place - token_id / 100 for place, token_id in enumerate(request.prompt_token_ids)][1:]


def guess(token_ids: IntArray, max_tokens: int) -> Proposal:
    """What `next_token` will say, but for about one token in four; sometimes nothing."""
    known: list[int] = token_ids.tolist()
    guessed: list[int] = []
    while len(guessed) < max_tokens:
        chance = zlib.crc32(bytes([*known, *guessed, 99]))
        guessed.append((next_token(known + guessed) + (chance % 4 == 0)) % 20)
    return Proposal(guessed[: zlib.crc32(bytes(known)) % (max_tokens + 1)], match_length=16)


def make_speculator(max_draft_tokens: int, propose: Proposer = guess) -> Speculator:
    """One for which every draft pays: more rows cost nothing."""
    return Speculator(propose, StepCosts({1: 1.0, 64: 1.0}), max_draft_tokens)


class TokenRoom:
    """Room for a number of tokens, whatever they attend to; one token of a prompt is always in it."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.missing: list[Chunk] = []
        """What the scheduler says that prompts lack."""

    def begin(self, decodes: SequenceOf[Sequence], prompts: Iterable[Chunk]) -> None:
        self.missing = list(prompts)
        self.max_tokens = max(1, self.max_tokens - len(decodes))

    def num_fitting(self, num_tokens: int, context: int, share: float) -> int:
        return min(num_tokens, math.ceil(share * self.max_tokens))

    def take(self, num_tokens: int, context: int) -> None:
        self.max_tokens -= num_tokens


class SlotMemory:
    """KV memory by slot: which tokens the stored KV was computed from. Finds every wrong share or overwrite."""

    def __init__(self, block_manager: BlockManager, known_tokens: Callable[[Sequence], list[int]]) -> None:
        """`known_tokens`: a sequence's tokens as the device knows them."""
        self._blocks = block_manager
        self._known_tokens = known_tokens
        self._slots: dict[tuple[int, int], PrefixKey] = {}

    def execute(self, batch: ScheduledBatch) -> None:
        """As a layer does: copy blocks, write the step's KV of all sequences, read everything each attends to."""
        size = self._blocks.block_size
        sources = [[self._slots.get((source, offset)) for offset in range(size)] for source, _ in batch.block_copies]
        for (_, target), source in zip(batch.block_copies, sources, strict=True):
            assert self._blocks.num_holders(target) == 1, "copied over while somebody else holds it"
            self._slots |= {(target, offset): key for offset, key in enumerate(source) if key is not None}
        scheduled = [
            (
                s.sequence,
                s.sequence.num_computed_tokens + s.num_tokens + len(s.draft),
                self._known_tokens(s.sequence) + s.draft,
            )
            for s in batch.scheduled
        ]
        for sequence, end, token_ids in scheduled:
            for position in range(sequence.num_computed_tokens, end):
                block = sequence.block_table[position // size]
                assert self._blocks.num_holders(block) == 1, "written while somebody else holds it"
                self._slots[block, position % size] = tuple(token_ids[: position + 1])
        for sequence, end, token_ids in scheduled:
            for position in range(end):
                slot = sequence.block_table[position // size], position % size
                assert self._slots[slot] == tuple(token_ids[: position + 1]), "read another prefix's KV"


class Simulation:
    """A scheduler with the memory above, stepped by hand; keeps every request's events."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int = 4,
        max_batch_tokens: int = 64,
        max_running: int | None = None,
        is_prefix_caching: bool = True,
        is_copying: bool = False,
        max_draft_tokens: int = 0,
        needs_tokens: Callable[[Sequence], bool] = lambda sequence: False,
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, is_prefix_caching=is_prefix_caching, is_copying=is_copying)
        self.scheduler = Scheduler(
            self.blocks,
            max_batch_tokens=max_batch_tokens,
            eos_token_ids=[EOS],
            max_running=max_running,
            drafter=make_speculator(max_draft_tokens) if max_draft_tokens else None,
            needs_tokens=needs_tokens,
        )
        self.memory = SlotMemory(self.blocks, self.known_tokens)
        self.model: Callable[[list[int]], int] = next_token
        self.not_finite: set[str] = set()
        self.requests: dict[str, GenerationRequest] = {}
        self.events: dict[str, list[TokenEvent]] = {}

    def add(
        self, request_id: str, prompt: list[int], max_new_tokens: int = 4, *, has_prompt_logprobs: bool = False
    ) -> None:
        request = make_request(request_id, prompt, max_new_tokens)
        if has_prompt_logprobs:
            request = msgspec.structs.replace(request, has_prompt_logprobs=True)
        self.requests[request_id] = request
        self.events[request_id] = []
        self.scheduler.add(request)

    @property
    def live_sequences(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def step(self, max_tokens: int | None = None) -> ScheduledBatch:
        batch = self.scheduler.schedule(None if max_tokens is None else TokenRoom(max_tokens))
        self.finish(batch)
        return batch

    def finish(self, batch: ScheduledBatch) -> list[TokenEvent]:
        """Run and update what was scheduled."""
        return self.take_in(batch, *self.compute(batch))

    def known_tokens(self, sequence: Sequence) -> list[int]:
        """As the device knows them."""
        return sequence.token_ids

    def compute(self, batch: ScheduledBatch) -> tuple[SampledBatch, list[float]]:
        """Tokens, and logprobs of scored tokens, each a number that is known from its token and place."""
        self.memory.execute(batch)
        token_ids = [
            self.model(self.known_tokens(scheduled.sequence) + scheduled.draft[:length])
            for scheduled in batch.scheduled
            for length in range(len(scheduled.rows))
        ]
        is_finite = [
            scheduled.sequence.request.request_id not in self.not_finite
            for scheduled in batch.scheduled
            for _ in scheduled.rows
        ]
        scores = []
        for scheduled in batch.scheduled:
            if scheduled.num_scored_tokens:
                sequence = scheduled.sequence
                next_scored = 1 + len(sequence.prompt_logprobs)
                assert next_scored >= 1 + sequence.num_computed_tokens
                scores += expected_scores(sequence.request)[next_scored - 1 :][: scheduled.num_scored_tokens]
        return SampledBatch(token_ids, [-1.0] * len(token_ids), is_finite), scores

    def take_in(self, batch: ScheduledBatch, sampled: SampledBatch, scores: list[float]) -> list[TokenEvent]:
        events = self.scheduler.update(batch, sampled, scores)
        for event in events:
            self.events[event.request_id].append(event)
        return events

    def output(self, request_id: str) -> list[int]:
        return [token_id for event in self.events[request_id] for token_id in event.token_ids]

    def drain(self) -> int:
        """Step until nothing is left; the number of steps."""
        num_steps = 0
        while self.scheduler.has_work:
            assert self.step().scheduled, "a step that does nothing: the engine would hang"
            num_steps += 1
        return num_steps


class OverlappedSimulation(Simulation):
    """Each step is launched before the last one's results are taken in, as `engine.overlap` does."""

    launched: tuple[ScheduledBatch, SampledBatch, list[float]] | None = None

    def known_tokens(self, sequence: Sequence) -> list[int]:
        if not sequence.has_unknown_token:
            return sequence.token_ids
        assert self.launched is not None
        return [*sequence.token_ids[:-1], self.launched[1].token_ids[sequence.unknown_row]]

    def finish(self, batch: ScheduledBatch) -> list[TokenEvent]:
        """Launch what was scheduled, and finish what was launched before."""
        last, self.launched = self.launched, self.launch(batch) if batch.scheduled else None
        return [] if last is None else self.take_in(*last)

    def launch(self, batch: ScheduledBatch) -> tuple[ScheduledBatch, SampledBatch, list[float]]:
        sampled, scores = self.compute(batch)
        for scheduled in batch.scheduled:
            tokens = scheduled.sequence.token_ids
            assert UNKNOWN_TOKEN not in tokens[:-1], "a token that is never known"
            assert not (scheduled.sequence.needs_tokens and scheduled.is_completing and UNKNOWN_TOKEN in tokens)
        self.scheduler.advance(batch)
        return batch, sampled, scores

    def drain(self) -> int:
        num_steps = 0
        while self.scheduler.has_work or self.launched is not None:
            is_waiting = self.launched is not None
            assert self.step().scheduled or is_waiting, "a step that does nothing: the engine would hang"
            num_steps += 1
        return num_steps


def ids_of(sequences: list[Sequence]) -> list[str]:
    return [sequence.request.request_id for sequence in sequences]


def scheduled_counts(batch: ScheduledBatch) -> dict[str, int]:
    return {scheduled.sequence.request.request_id: scheduled.num_tokens for scheduled in batch.scheduled}


def sequences_of(batch: ScheduledBatch) -> list[Sequence]:
    return [scheduled.sequence for scheduled in batch.scheduled]


def make_batch(
    sequences: SequenceOf[Sequence], counts: SequenceOf[int], drafts: SequenceOf[list[int]] = ()
) -> ScheduledBatch:
    """`counts[i]` tokens of `sequences[i]`, and its draft where there are some."""
    batch = ScheduledBatch()
    for sequence, count, draft in zip(sequences, counts, drafts or [[]] * len(sequences), strict=True):
        batch.add(sequence, count, draft)
    return batch
