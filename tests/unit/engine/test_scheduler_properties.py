"""Random histories of arrivals, aborts and steps in little memory: what must hold at every point, and at the end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.link.messages import FinishReason
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence
from tests.unit.engine.builders import (
    EOS,
    OverlappedSimulation,
    Simulation,
    TokenRoom,
    expected_output,
    expected_scores,
    ids_of,
    sequences_of,
)

# Few tokens and few beginnings, so that prefixes are shared more often than not.
TOKENS = st.integers(0, 2)
REST = st.lists(TOKENS, min_size=1, max_size=6)
BEGINNINGS = st.sampled_from([[], [1] * 6, [1] * 12, [1, 1, 1, 1, 2, 2, 2, 2], [2] * 8])


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go and are stepped; the fake runner checks every KV read and write."""

    is_prefix_caching = True
    max_draft_tokens = 0
    steps_per_token = 1
    histories_per_example = 1.0

    @initialize(
        num_blocks=st.integers(4, 12),
        block_size=st.integers(1, 4),
        max_batch_tokens=st.integers(1, 24),
        max_running=st.none() | st.integers(1, 3),
        is_copying=st.booleans(),
    )
    def start(
        self, num_blocks: int, block_size: int, max_batch_tokens: int, max_running: int | None, is_copying: bool
    ) -> None:
        self.simulation = self.make_simulation(
            num_blocks=num_blocks,
            block_size=block_size,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            is_prefix_caching=self.is_prefix_caching,
            is_copying=is_copying,
            max_draft_tokens=self.max_draft_tokens,
        )
        self.capacity = num_blocks * block_size
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running or num_blocks
        self.aborted: set[str] = set()

    @staticmethod
    def make_simulation(**options: Any) -> Simulation:
        return Simulation(**options)

    @rule(prompts=st.lists(st.tuples(BEGINNINGS, REST), min_size=1, max_size=3), max_new_tokens=st.integers(1, 24))
    def add(self, prompts: list[tuple[list[int], list[int]]], max_new_tokens: int) -> None:
        for beginning, rest in prompts:
            prompt = (beginning + rest)[: self.capacity - 1]
            request_id = f"r{len(self.simulation.requests)}"
            self.simulation.add(request_id, prompt, min(max_new_tokens, self.capacity - len(prompt)))

    @rule(number=st.integers(0, 40))
    def abort(self, number: int) -> None:
        request_id = f"r{number}"  # waiting, running, ended or never seen
        if request_id in ids_of(self.simulation.live_sequences):
            self.aborted.add(request_id)
        self.simulation.scheduler.abort(request_id)

    @precondition(lambda self: self.simulation.scheduler.has_work)
    @rule(limits=st.lists(st.none() | st.integers(1, 30), min_size=1, max_size=5))
    def step(self, limits: list[int | None]) -> None:
        for max_tokens in limits:
            if self.simulation.scheduler.has_work:
                self.step_once(max_tokens)
                self.simulation.scheduler.check_integrity()

    def step_once(self, max_tokens: int | None) -> None:
        scheduler = self.simulation.scheduler
        oldest = min(self.simulation.live_sequences, key=lambda sequence: sequence.arrival_time)
        is_waiting = oldest.is_waiting_for_results or (oldest in scheduler.waiting and oldest.num_launched > 0)
        running = list(scheduler.running)
        lacking = [s for s in running if s.num_uncomputed_tokens == 1 and not s.is_waiting_for_results]
        batch = scheduler.schedule(None if max_tokens is None else TokenRoom(max_tokens))
        if any(sequence not in scheduler.running for sequence in running):
            event("preempted")
        if any(scheduled.sequence.num_cached_tokens for scheduled in batch.scheduled):
            event("reused a prefix")
        if batch.block_copies:
            event("copied a block")
        assert oldest in sequences_of(batch) or is_waiting, "the oldest request always gets on"
        self.check_batch(batch, lacking, max_tokens)
        self.simulation.finish(batch)

    def check_batch(self, batch: ScheduledBatch, lacking: list[Sequence], max_tokens: int | None) -> None:
        sequences = sequences_of(batch)
        assert len(set(ids_of(sequences))) == len(sequences)
        assert batch.num_tokens <= self.max_batch_tokens
        assert len(self.simulation.scheduler.running) <= self.max_running
        for scheduled in batch.scheduled:
            sequence, count, draft = scheduled.sequence, scheduled.num_tokens, scheduled.draft
            assert sequence in self.simulation.scheduler.running
            assert 1 <= count <= sequence.num_uncomputed_tokens
            last = sequence.num_computed_tokens + count + len(draft)
            assert last <= len(sequence.block_table) * self.simulation.blocks.block_size
            assert sequence.num_output_tokens + len(draft) < sequence.request.max_new_tokens or not draft
            if draft:
                event("drafted")
        decodes = [sequence for sequence in lacking if sequence.block_table and sequence in sequences]
        assert sequences[: len(decodes)] == decodes, "decodes first, in order"
        kept = [s for s in lacking if s in self.simulation.scheduler.running and s.num_output_tokens]
        assert set(ids_of(kept)) <= set(ids_of(sequences)), "a running sequence gets a token in every step"
        if max_tokens is not None:
            assert batch.num_tokens <= max(max_tokens, len(decodes) + 1)

    @invariant()
    def is_whole(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        max_steps = self.steps_per_token * sum(
            len(sequence.request.prompt_token_ids) + sequence.request.max_new_tokens
            for sequence in self.simulation.live_sequences
        )
        max_steps += self.steps_per_token - 1  # to finish what is launched for requests that are aborted
        assert self.simulation.drain() <= max_steps, "the oldest computes a token in every step"
        assert self.simulation.blocks.num_used_blocks == 0
        for request_id in self.simulation.requests:
            self.check_events(request_id)

    def check_events(self, request_id: str) -> None:
        events = self.simulation.events[request_id]
        request = self.simulation.requests[request_id]
        expected = expected_output(request)
        output = self.simulation.output(request_id)
        if request_id in self.aborted:
            assert output == expected[: len(output)]
            assert not any(event.is_terminal for event in events)
            return
        assert output == expected
        assert [event.is_terminal for event in events] == [False] * (len(events) - 1) + [True]
        max_tokens = 1 + self.max_draft_tokens
        assert all(1 <= len(event.token_ids) == len(event.logprobs) <= max_tokens for event in events)
        is_full = len(output) == request.max_new_tokens
        assert events[-1].finish_reason is (FinishReason.LENGTH if is_full else FinishReason.EOS_TOKEN)
        assert is_full or output[-1] == EOS


class UncachedSchedulerMachine(SchedulerMachine):
    is_prefix_caching = False
    histories_per_example = 0.5

    @invariant()
    def nothing_is_shared(self) -> None:
        if hasattr(self, "simulation"):
            assert self.simulation.blocks.num_cached_blocks == 0
            assert max(map(self.simulation.blocks.num_holders, range(self.simulation.blocks.num_blocks))) <= 1


class SpeculatingSchedulerMachine(SchedulerMachine):
    """Drafts are right more often than not; neither right nor wrong ones change anything but the number of steps."""

    max_draft_tokens = 4


def is_third(sequence: Sequence) -> bool:
    return int(sequence.request.request_id[1:]) % 3 == 0


class OverlappedSchedulerMachine(SchedulerMachine):
    """A step is launched before the last one is taken in. Every third request needs its tokens on the host."""

    steps_per_token = 2

    @staticmethod
    def make_simulation(**options: Any) -> Simulation:
        return OverlappedSimulation(**options, needs_tokens=is_third)

    @rule(beginning=BEGINNINGS, rest=REST, max_new_tokens=st.integers(1, 8))
    def add_scored(self, beginning: list[int], rest: list[int], max_new_tokens: int) -> None:
        prompt = (beginning + rest)[: self.capacity - 1]
        request_id = f"r{len(self.simulation.requests)}"
        max_new_tokens = min(max_new_tokens, self.capacity - len(prompt))
        self.simulation.add(request_id, prompt, max_new_tokens, has_prompt_logprobs=True)

    def step_once(self, max_tokens: int | None) -> None:
        self.note_what_is_in_vain()
        super().step_once(max_tokens)

    def note_what_is_in_vain(self) -> None:
        launched = self.simulation.launched  # type: ignore[attr-defined]
        if launched is not None and any(
            s.sequence not in self.simulation.live_sequences for s in launched[0].scheduled
        ):
            event("computed in vain")

    def check_events(self, request_id: str) -> None:
        super().check_events(request_id)
        request, events = self.simulation.requests[request_id], self.simulation.events[request_id]
        if events:
            assert events[0].prompt_logprobs == (expected_scores(request) if request.has_prompt_logprobs else [])
        assert not any(event.prompt_logprobs for event in events[1:])


class UncachedOverlappedSchedulerMachine(OverlappedSchedulerMachine):
    is_prefix_caching = False
    histories_per_example = 0.5


MACHINES = [
    SchedulerMachine,
    UncachedSchedulerMachine,
    SpeculatingSchedulerMachine,
    OverlappedSchedulerMachine,
    UncachedOverlappedSchedulerMachine,
]


@pytest.mark.hypothesis
@pytest.mark.parametrize("machine", MACHINES)
def test_every_history_keeps_the_invariants(machine: type[SchedulerMachine]) -> None:
    num_histories = int(machine.histories_per_example * settings().max_examples)

    class Case(machine.TestCase):  # type: ignore[name-defined,misc]
        settings = settings(max_examples=num_histories, stateful_step_count=40)

    Case().runTest()


@given(data=st.data(), is_copying=st.booleans())
def test_cached_tokens_are_the_longest_computed_common_prefix(data: Any, is_copying: bool) -> None:
    """With memory to spare, a prompt reuses what some earlier text began with: its full blocks, or all with copies."""
    block_size = data.draw(st.integers(1, 4))
    simulation = Simulation(num_blocks=400, block_size=block_size, max_batch_tokens=1000, is_copying=is_copying)
    unit = 1 if is_copying else block_size
    texts: list[list[int]] = []
    for number in range(data.draw(st.integers(2, 6))):
        beginnings = st.sampled_from(texts) | BEGINNINGS if texts else BEGINNINGS
        prompt = data.draw(beginnings) + data.draw(REST)
        simulation.add(f"r{number}", prompt, data.draw(st.integers(1, 4)))
        simulation.step()
        sequence = next((s for s in simulation.live_sequences if s.request.request_id == f"r{number}"), None)
        reusable = max((common_units(text, prompt, unit) for text in texts), default=0)
        if sequence is not None:
            assert sequence.num_cached_tokens == reusable * unit
        simulation.drain()
        texts.append(prompt + simulation.output(f"r{number}")[:-1])  # the last token's KV is never computed


def common_units(text: list[int], prompt: list[int], unit: int) -> int:
    """Leading units of so many tokens of `text` that `prompt` begins with, the prompt's last token excluded."""
    max_units = min(len(text), len(prompt) - 1) // unit
    return max(n for n in range(max_units + 1) if text[: n * unit] == prompt[: n * unit])
