"""The scheduler: who runs next, and how many tokens of each. Plain Python over token counts: no torch, no text.

There is no prefill or decode phase: a sequence has tokens, some of which are computed; a step computes some more under
a budget. One token for every sequence that only lacks its newest comes first, so decoding never starves; then prompts
share what is left (`engine.scheduling.shares`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as SequenceOf

from engine.link.messages import EngineStats, FinishReason, GenerationRequest, TokenEvent
from engine.scheduling.adapters import AdapterCache
from engine.scheduling.batch import SampledBatch, ScheduledBatch, ScheduledSequence
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.sequence import UNKNOWN_TOKEN, OutputGrammar, Sequence
from engine.scheduling.shares import missing_chunks, turns
from engine.scheduling.speculate import Drafter, NoDrafter
from engine.scheduling.step_limit import EndlessRoom, StepRoom

NON_FINITE_ERROR = "the model's output is not a finite number; try --dtype float32 or check the weights"


class Scheduler:
    """Owns the two queues and, through the block manager, the KV memory."""

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_batch_tokens: int,
        eos_token_ids: Collection[int],
        max_running: int | None = None,
        drafter: Drafter | None = None,
        needs_tokens: Callable[[Sequence], bool] = lambda sequence: False,
        adapters: AdapterCache | None = None,
    ) -> None:
        """`max_running` None: only memory limits the running sequences. `drafter` None: nothing is drafted.

        `needs_tokens` tells a sequence whose next token can't be chosen before the host knows all others. `adapters`
        None: no request names one.
        """
        self._blocks = block_manager
        self._drafter = drafter or NoDrafter()
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running
        self._needs_tokens = needs_tokens
        self.adapters = adapters or AdapterCache()
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._num_preemptions = 0
        self._num_prefix_hit_tokens = 0
        self.num_admissions = 0
        """Since the start: admissions of sequences that waited, those after a preemption included."""

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def add(
        self, request: GenerationRequest, *, grammar: OutputGrammar | None = None, arrival_time: float | None = None
    ) -> None:
        """Let a request wait for its turn.

        `arrival_time` by `time.monotonic()` is that of a request that had to wait for its `grammar`; None: now.
        """
        adapter = None if request.adapter_id is None else self.adapters.find(request.adapter_id)
        arrival_time = arrival_time or time.monotonic()
        sequence = Sequence(request, arrival_time=arrival_time, grammar=grammar, adapter=adapter)
        sequence.needs_tokens = self._needs_tokens(sequence)
        self._sequences[request.request_id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its memory at once; an unknown id may just have ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            if sequence.num_output_tokens and not sequence.num_launched:  # it is known to be finite, and stands still
                self._blocks.publish_last_block(sequence)
            self._remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks away; it waits again, before all others."""
        self._stop_running(sequence)
        self.waiting.appendleft(sequence)
        self._num_preemptions += 1

    def schedule(self, room: StepRoom | None = None) -> ScheduledBatch:
        """Decide the next step: at most `max_batch_tokens` tokens, and prompts within `room`; None: that is endless."""
        room = room or EndlessRoom()
        num_admissions = self.num_admissions
        decodes = self._decodes()
        # Those that wait for results come back: their places are not for newcomers.
        budget = self._max_batch_tokens - len(decodes) - sum(s.is_waiting_for_results for s in self.running)
        under_way = [s for s in self.running if s.is_prompt and not s.is_waiting_for_results]
        room.begin(decodes, missing_chunks(under_way, self.waiting, self._blocks.num_findable_tokens))
        chunks = self._chunks(under_way, budget, room)
        # A prompt makes the step long anyway. That drafts attend to what is before them is not counted: they are few.
        drafts = [[] for _ in decodes] if chunks else self._draft(decodes, room.num_fitting(budget, 0, 1.0))
        batch = ScheduledBatch(num_admitted=self.num_admissions - num_admissions)
        for sequence, draft in zip(decodes, drafts, strict=True):
            batch.add(sequence, 1, draft)
        for sequence, count in chunks.items():
            batch.add(sequence, count)
        return batch

    def _decodes(self) -> list[Sequence]:
        """The running sequences that lack only their newest token, with a block for it."""
        decodes: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.is_prompt or sequence.is_waiting_for_results:
                continue
            if self._make_room(sequence):
                decodes.append(sequence)
        return decodes

    def _chunks(self, under_way: list[Sequence], budget: int, room: StepRoom) -> dict[Sequence, int]:
        """Prompts, and how many tokens of each the step computes: `budget` together, within `room`.

        `under_way` are the running ones that lack tokens of their prompts.
        """
        counts: dict[Sequence, int] = {}
        is_open = True

        def num_missing(sequence: Sequence) -> int:
            if sequence.block_table:
                return sequence.num_uncomputed_tokens - counts.get(sequence, 0)
            # One that can't be admitted has no use for room.
            return sequence.num_tokens - self._blocks.num_findable_tokens(sequence) if is_open else 0

        for sequence, share in turns([*under_way, *self.waiting], num_missing):
            if budget <= 0:
                break
            is_open = is_open and self._prepare(sequence, is_served=sequence in counts)
            if not (is_open or under_way or counts):
                break  # none of those that wait can be admitted
            if sequence.block_table and (missing := num_missing(sequence)):
                context = sequence.num_computed_tokens + counts.get(sequence, 0)
                if count := room.num_fitting(min(missing, math.ceil(share * budget)), context, share):
                    room.take(count, context)
                    counts[sequence] = counts.get(sequence, 0) + count
                    budget -= count
        for sequence in counts:
            self._note_begin(sequence)
        return counts

    def _draft(self, sequences: list[Sequence], budget: int) -> list[list[int]]:
        """A draft for each sequence, within its request's limit and the free blocks: nobody is preempted for one."""
        rooms = [sequence.request.max_new_tokens - sequence.num_output_tokens - 1 for sequence in sequences]
        drafts = self._drafter.draft(sequences, rooms, budget)
        for sequence, draft in zip(sequences, drafts, strict=True):
            if draft and not self._blocks.grow(sequence, len(draft), num_spare_blocks=len(self.running)):
                del draft[len(sequence.block_table) * self._blocks.block_size - sequence.num_tokens :]
        return drafts

    def advance(self, batch: ScheduledBatch) -> None:
        """Count a step as computed once it is launched, so that the next one can be scheduled before its results.

        The tokens that it chooses are unknown until `update`. It has no drafts.
        """
        batch.is_launched = True
        for scheduled in batch.scheduled:
            sequence = scheduled.sequence
            self._blocks.end_copy(sequence)  # what later steps write into the block comes after the copy
            sequence.num_computed_tokens += scheduled.num_tokens
            sequence.num_launched += 1
            if scheduled.is_completing:
                sequence.token_ids.append(UNKNOWN_TOKEN)
                sequence.unknown_row = scheduled.rows.start

    def update(
        self, batch: ScheduledBatch, sampled: SampledBatch, prompt_scores: SequenceOf[float] = ()
    ) -> list[TokenEvent]:
        """Take in what a step computed; the events are what the callers see.

        `prompt_scores` belong to the tokens that `num_scored_tokens` counts, sequence after sequence: for each its
        logprob, its rank if the batch has those, and ids and logprobs of `num_prompt_top_tokens` likeliest ones. What
        was computed for a sequence that has ended meanwhile is dropped.
        """
        events: list[TokenEvent] = []
        scores = iter(prompt_scores)
        for scheduled in batch.scheduled:
            sequence = scheduled.sequence
            for _ in range(scheduled.num_scored_tokens):
                logprob, rank = next(scores), int(next(scores)) if batch.has_prompt_ranks else None
                sequence.add_score(logprob, rank, *_take_tops(scores, batch.num_prompt_top_tokens))
            if batch.is_launched:
                sequence.num_launched -= 1
                if self._sequences.get(sequence.request.request_id) is not sequence:
                    continue
            else:
                sequence.num_computed_tokens += scheduled.num_tokens
                self._blocks.end_copy(sequence)
            new_events = self._accept(scheduled, sampled) if scheduled.is_completing else []
            self._share_blocks(scheduled, new_events, is_launched=batch.is_launched)
            if new_events and new_events[-1].is_terminal:
                self._remove(sequence)
            elif scheduled.draft:
                self._blocks.shrink(sequence)
            events += new_events
        return events

    def take_back(self, batch: ScheduledBatch, victim: Sequence, error: str) -> list[TokenEvent]:
        """Forget a step that was scheduled and not computed, and end one of its sequences with `error`."""
        for scheduled in batch.scheduled:
            if scheduled.draft:
                self._blocks.shrink(scheduled.sequence)
        self._remove(victim)
        return [TokenEvent(request_id=victim.request.request_id, error=error)]

    def fail_all(self, error: str) -> list[TokenEvent]:
        """End every request with `error`."""
        events = [TokenEvent(request_id=request_id, error=error) for request_id in self._sequences]
        for sequence in list(self._sequences.values()):
            self._remove(sequence)
        return events

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_used_blocks=self._blocks.num_used_blocks,
            num_cached_blocks=self._blocks.num_cached_blocks,
            num_blocks=self._blocks.num_blocks,
            block_size=self._blocks.block_size,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            num_preemptions=self._num_preemptions,
            num_draft_steps=self._drafter.num_drafts,
            num_drafted_tokens=self._drafter.num_drafted,
            num_accepted_tokens=self._drafter.num_accepted,
            num_adapter_loads=self.adapters.num_loads,
        )

    def check_integrity(self) -> None:
        """Check what holds between any two operations, in the block manager, too. For tests. Raises AssertionError."""
        everyone = [*self.running, *self.waiting]
        assert len(everyone) == len(self._sequences), "a sequence is in both queues, or in none"
        assert all(self._sequences.get(s.request.request_id) is s for s in everyone)
        arrivals = [sequence.arrival_time for sequence in everyone]
        assert arrivals == sorted(arrivals), "first come, first served"
        for sequence in self.waiting:
            assert not sequence.block_table and not sequence.num_computed_tokens, "a waiting sequence holds memory"
        self._blocks.check_integrity(self.running)
        self.adapters.check_integrity([sequence.adapter for sequence in self.running])

    def _make_room(self, sequence: Sequence) -> bool:
        """Get a block for the newest token, preempting the latest arrivals; False if `sequence` itself had to go."""
        while not self._blocks.grow(sequence):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def _prepare(self, sequence: Sequence, *, is_served: bool) -> bool:
        """Give a sequence its memory, after all that wait before it; False if there is none.

        One that was admitted only because it stood before another may share the prefix of those computed meanwhile.
        """
        if sequence.block_table:
            if sequence.queue_time_s is None and not is_served:
                self._blocks.free(sequence)
                self._blocks.admit(sequence)
            return True
        while self._admit_first():
            if sequence.block_table:
                return True
        return False

    def _admit_first(self) -> bool:
        """Move the first waiting sequence to the running ones if there is a place for it and its adapter, and it fits.

        A block for each running sequence stays free: they will want one soon, and would preempt the newcomer for it.
        A sequence that was preempted while a step was launched with it waits for that step's results.
        """
        sequence = self.waiting[0]
        if len(self.running) in (self._max_running, self._max_batch_tokens) or sequence.num_launched:
            return False
        if not self.adapters.hold(sequence.adapter):
            return False
        if not self._blocks.admit(sequence, num_spare_blocks=len(self.running)):
            self.adapters.release(sequence.adapter)
            return False
        self.running.append(self.waiting.popleft())
        self.num_admissions += 1
        return True

    def _note_begin(self, sequence: Sequence) -> None:
        """A step computes some of the sequence, for the first time if that was not noted yet."""
        if sequence.queue_time_s is None:
            self._num_prefix_hit_tokens += sequence.num_computed_tokens
            sequence.num_prefix_hit_tokens = sequence.num_computed_tokens
            sequence.queue_time_s = time.monotonic() - sequence.arrival_time

    def _accept(self, scheduled: ScheduledSequence, sampled: SampledBatch) -> list[TokenEvent]:
        """Take the next token, and one more for each token of the draft that was right; an error is an event alone."""
        sequence = scheduled.sequence
        place = scheduled.num_computed_tokens + scheduled.num_tokens
        event = TokenEvent(request_id=sequence.request.request_id)
        if place == sequence.num_prompt_tokens:
            event.queue_time_s = sequence.queue_time_s
            event.num_cached_tokens = sequence.num_prefix_hit_tokens
            sequence.move_scores(event)
            if not all(map(math.isfinite, event.prompt_logprobs)):
                return [TokenEvent(request_id=event.request_id, error=NON_FINITE_ERROR)]
        error = None
        for row, guess in zip(scheduled.rows, [*scheduled.draft, None], strict=True):
            token_id = sampled.token_ids[row]
            cause = NON_FINITE_ERROR if not sampled.is_finite[row] else _grammar_error(sequence, token_id)
            if cause is not None:
                error = TokenEvent(request_id=event.request_id, error=cause)
                break
            event.token_ids.append(token_id)
            event.logprobs.append(sampled.logprobs[row])
            if sequence.request.sampling.num_top_tokens:
                event.top_token_ids.append(sampled.top_token_ids[row])
                event.top_logprobs.append(sampled.top_logprobs[row])
            sequence.token_ids[place : place + 1] = [token_id]  # appends it, or replaces the unknown one
            place += 1
            event.finish_reason = self._finish_reason(sequence, place - sequence.num_prompt_tokens, token_id)
            if event.finish_reason is not None or token_id != guess:
                break
            sequence.num_computed_tokens += 1
        self._drafter.observe(sequence, scheduled.draft, event.token_ids)
        events = [event] if event.token_ids else []
        return events if error is None else [*events, error]

    def _share_blocks(self, scheduled: ScheduledSequence, events: list[TokenEvent], *, is_launched: bool) -> None:
        """Let others find the blocks that a step has filled, and nothing of a sequence that is not finite.

        What a launched step goes on to compute may still turn out not to be finite, and its tokens are unknown.
        """
        sequence = scheduled.sequence
        error = events[-1].error if events else None
        if error is None:
            end = sequence.num_computed_tokens
            if is_launched:
                end = min(end, scheduled.num_computed_tokens + scheduled.num_tokens)
            self._blocks.publish_full_blocks(sequence, scheduled.num_computed_tokens, end)
            if events and events[-1].is_terminal and not sequence.num_launched:
                self._blocks.publish_last_block(sequence)
        elif error == NON_FINITE_ERROR:
            self._blocks.withdraw_blocks(sequence)

    def _finish_reason(self, sequence: Sequence, num_output_tokens: int, token_id: int) -> FinishReason | None:
        """The reason why the sequence ends with this token; None: it goes on. Length comes first, as in TGI.

        A grammar allows that token only where the output is complete, and nothing may follow it.
        """
        if num_output_tokens >= sequence.request.max_new_tokens:
            return FinishReason.LENGTH
        if token_id in sequence.request.stop_token_ids:
            return FinishReason.EOS_TOKEN
        if token_id not in self.eos_token_ids:
            return None
        is_ignoring_eos = sequence.request.is_ignoring_eos and sequence.grammar is None
        return None if is_ignoring_eos else FinishReason.EOS_TOKEN

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        self._drafter.forget(sequence)
        if sequence.block_table:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.free(sequence)
        self.adapters.release(sequence.adapter)


def _take_tops(scores: Iterator[float], num_top: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens of one place, and their logprobs."""
    token_ids = [int(token_id) for token_id in itertools.islice(scores, num_top)]
    return token_ids, [*itertools.islice(scores, num_top)]


def _grammar_error(sequence: Sequence, token_id: int) -> str | None:
    """The reason why `token_id` cannot be the sequence's next one; None: it can, and its grammar has taken it in."""
    grammar = sequence.grammar
    if grammar is None or (grammar.error is None and grammar.advance(token_id)):
        return None
    return grammar.error
