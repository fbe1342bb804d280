"""The scheduler by example: order, budgets, admission, preemption, aborts, ends."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from engine.link.messages import FinishReason, SamplingParams
from engine.scheduling.batch import SampledBatch
from engine.scheduling.scheduler import NON_FINITE_ERROR
from engine.scheduling.sequence import Sequence
from tests.unit.engine.builders import (
    EOS,
    Simulation,
    TokenRoom,
    ids_of,
    make_batch,
    scheduled_counts,
    sequences_of,
)


def never_eos(token_ids: list[int]) -> int:
    return len(token_ids) % EOS


def make_simulation(*, num_blocks: int = 32, max_batch_tokens: int = 64, is_prefix_caching: bool = True) -> Simulation:
    simulation = Simulation(
        num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, is_prefix_caching=is_prefix_caching
    )
    simulation.model = never_eos
    return simulation


def prompt_of(size: int, first: int = 0) -> list[int]:
    """Tokens that no prompt with another `first` starts with."""
    return [first, *range(10, 10 + size - 1)]


def test_a_request_gets_its_tokens_and_one_end() -> None:
    simulation = make_simulation()
    simulation.add("a", prompt_of(5), max_new_tokens=3)
    assert scheduled_counts(simulation.step()) == {"a": 5}
    assert scheduled_counts(simulation.step()) == {"a": 1}
    assert simulation.scheduler.has_work
    simulation.step()
    assert not simulation.scheduler.has_work
    events = simulation.events["a"]
    assert [event.token_ids for event in events] == [[5], [6], [0]]
    assert [event.finish_reason for event in events] == [None, None, FinishReason.LENGTH]
    assert [event.logprobs for event in events] == [[-1.0]] * 3


def test_queue_time_is_told_once_with_the_first_token() -> None:
    simulation = make_simulation()
    simulation.add("a", prompt_of(5), max_new_tokens=3)
    simulation.drain()
    first, *later = [event.queue_time_s for event in simulation.events["a"]]
    assert first is not None and first >= 0.0
    assert later == [None, None]


def test_queue_time_is_of_the_first_admission_even_after_a_preemption() -> None:
    simulation = make_simulation()
    simulation.add("a", prompt_of(5))
    simulation.scheduler.schedule(TokenRoom(2))
    sequence = simulation.scheduler.running[0]
    queue_time_s = sequence.queue_time_s
    simulation.scheduler.preempt(sequence)
    simulation.scheduler.schedule()
    assert sequence.queue_time_s == queue_time_s


def test_eos_ends_a_request_and_is_part_of_its_tokens() -> None:
    simulation = make_simulation()
    simulation.model = lambda token_ids: EOS if len(token_ids) == 6 else 1
    simulation.add("a", prompt_of(5), max_new_tokens=9)
    simulation.drain()
    assert simulation.output("a") == [1, EOS]
    assert simulation.events["a"][-1].finish_reason is FinishReason.EOS_TOKEN


def test_length_is_looked_at_before_eos() -> None:
    simulation = make_simulation()
    simulation.model = lambda token_ids: EOS
    simulation.add("a", prompt_of(5), max_new_tokens=1)
    simulation.drain()
    assert simulation.events["a"][-1].finish_reason is FinishReason.LENGTH


def test_a_request_that_ignores_eos_goes_on() -> None:
    simulation = make_simulation()
    simulation.model = lambda token_ids: EOS
    simulation.add("a", prompt_of(5), max_new_tokens=3)
    sequence = simulation.scheduler.waiting[0]
    sequence.request = msgspec.structs.replace(sequence.request, is_ignoring_eos=True)
    simulation.drain()
    assert simulation.output("a") == [EOS] * 3
    assert simulation.events["a"][-1].finish_reason is FinishReason.LENGTH


def test_top_tokens_are_told_for_each_token_of_those_who_ask() -> None:
    simulation = make_simulation()
    simulation.add("a", prompt_of(5), max_new_tokens=3)
    simulation.add("b", prompt_of(5), max_new_tokens=3)
    sequence = simulation.scheduler.waiting[0]
    sequence.request = msgspec.structs.replace(sequence.request, sampling=SamplingParams(num_top_tokens=2))
    batch = make_batch(sequences_of(simulation.scheduler.schedule()), [5, 5], [[5], []])
    lists = [[5, 9], [6, 9], []], [[-0.5, -1.0], [-0.25, -2.0], []]
    first, second = simulation.scheduler.update(batch, SampledBatch([5, 6, 5], [-1.0] * 3, [True] * 3, *lists))
    assert (first.token_ids, first.top_token_ids) == ([5, 6], [[5, 9], [6, 9]])
    assert first.top_logprobs == [[-0.5, -1.0], [-0.25, -2.0]]
    assert (second.token_ids, second.top_token_ids, second.top_logprobs) == ([5], [], [])


def test_an_eos_token_of_the_prompt_does_not_end_it() -> None:
    simulation = make_simulation()
    simulation.add("a", [EOS, EOS], max_new_tokens=2)
    simulation.drain()
    assert simulation.output("a") == [2, 3]


def test_non_finite_logits_fail_only_their_request() -> None:
    simulation = make_simulation()
    simulation.add("bad", prompt_of(5, 1))
    simulation.add("good", prompt_of(5, 2))
    simulation.not_finite = {"bad"}
    simulation.drain()
    (event,) = simulation.events["bad"]
    assert (event.error, event.token_ids, event.finish_reason) == (NON_FINITE_ERROR, [], None)
    assert len(simulation.output("good")) == 4
    assert simulation.blocks.num_used_blocks == 0


def test_decodes_come_first_then_chunks_then_arrivals() -> None:
    simulation = make_simulation(max_batch_tokens=10)
    simulation.add("long", prompt_of(18, 1))
    simulation.step(max_tokens=8)
    simulation.add("short", prompt_of(6, 2))
    assert scheduled_counts(simulation.step(max_tokens=10)) == {"long": 10}
    assert scheduled_counts(simulation.step(max_tokens=5)) == {"long": 1, "short": 4}
    simulation.add("late", prompt_of(25, 3))
    batch = simulation.step()
    assert list(scheduled_counts(batch).items()) == [("long", 1), ("short", 2), ("late", 7)]
    simulation.add("later", prompt_of(18, 4))
    batch = simulation.step()
    assert list(scheduled_counts(batch).items()) == [("long", 1), ("short", 1), ("late", 8)]


@pytest.mark.parametrize(("max_tokens", "chunk"), [(None, 14), (1, 1), (2, 1), (3, 1), (8, 6), (100, 14)])
def test_step_limit_cuts_prompts_but_leaves_one_token(max_tokens: int | None, chunk: int) -> None:
    simulation = make_simulation(max_batch_tokens=16)
    simulation.add("a", prompt_of(3, 1))
    simulation.add("b", prompt_of(3, 2))
    simulation.step()
    simulation.add("prompt", prompt_of(30, 3))
    assert scheduled_counts(simulation.step(max_tokens)) == {"a": 1, "b": 1, "prompt": chunk}


def test_a_step_is_told_what_prompts_lack() -> None:
    simulation = make_simulation(num_blocks=8)

    def missing(max_tokens: int) -> list[tuple[int, int]]:
        room = TokenRoom(max_tokens)
        simulation.finish(simulation.scheduler.schedule(room))
        return list(room.missing)

    simulation.add("a", prompt_of(5, 1), max_new_tokens=9)
    simulation.add("b", prompt_of(20, 2))
    assert missing(5) == [(5, 0), (20, 0)]
    assert missing(13) == [(20, 0)]  # "a" decodes
    assert missing(3) == [(8, 12)]
    simulation.add("no memory", prompt_of(12, 3))
    assert missing(3) == [(6, 14), (12, 0)]
    simulation.add("as b", prompt_of(20, 2))
    assert missing(1) == [(4, 16), (12, 0), (4, 16)]  # of "b" the cache has all full blocks


def test_a_step_is_told_what_a_preempted_prompt_lacks_once() -> None:
    simulation = make_simulation(num_blocks=7, is_prefix_caching=False)
    for name in ("a", "b", "c"):
        simulation.add(name, prompt_of(4, ord(name)), max_new_tokens=9)
    for _ in range(5):
        simulation.step()
    room = TokenRoom(64)
    simulation.finish(simulation.scheduler.schedule(room))
    assert ids_of(list(simulation.scheduler.waiting)) == ["c"]
    assert list(room.missing) == [(9, 0)]


def test_no_more_sequences_run_than_a_step_has_tokens() -> None:
    simulation = make_simulation(max_batch_tokens=2)
    for name in ("a", "b", "c"):
        simulation.add(name, prompt_of(1, ord(name)))
    assert scheduled_counts(simulation.step()) == {"a": 1, "b": 1}
    assert scheduled_counts(simulation.step()) == {"a": 1, "b": 1}
    simulation.drain()
    assert len(simulation.output("c")) == 4


def test_no_more_sequences_run_than_allowed() -> None:
    simulation = Simulation(num_blocks=32, max_running=2)
    simulation.model = never_eos
    for name in ("a", "b", "c"):
        simulation.add(name, prompt_of(1, ord(name)))
    assert scheduled_counts(simulation.step()) == {"a": 1, "b": 1}
    simulation.scheduler.abort("a")
    assert scheduled_counts(simulation.step()) == {"b": 1, "c": 1}
    simulation.drain()
    assert len(simulation.output("c")) == 4


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    simulation = make_simulation(num_blocks=4)
    simulation.add("a", prompt_of(4, 1))  # 1 block of 4 tokens
    simulation.add("b", prompt_of(12, 2))  # 3 blocks: they are there, but a will want one of them
    simulation.step()
    assert ids_of(simulation.scheduler.running) == ["a"]
    simulation.scheduler.abort("b")
    simulation.add("c", prompt_of(8, 3))  # 2 blocks: one is left
    assert ids_of(sequences_of(simulation.step())) == ["a"]  # a takes its second block, so only 2 are free
    simulation.scheduler.abort("a")
    assert ids_of(sequences_of(simulation.step())) == ["c"]


def test_a_large_request_at_the_front_is_not_overtaken() -> None:
    simulation = make_simulation(num_blocks=4)
    simulation.add("a", prompt_of(4, 1), max_new_tokens=2)
    simulation.add("large", prompt_of(14, 2), max_new_tokens=2)
    simulation.add("small", prompt_of(1, 3), max_new_tokens=2)
    simulation.step()
    assert ids_of(list(simulation.scheduler.waiting)) == ["large", "small"]
    simulation.drain()
    assert len(simulation.output("large")) == len(simulation.output("small")) == 2


def test_the_latest_arrival_is_preempted_and_comes_back_first() -> None:
    simulation = make_simulation(num_blocks=7)
    for name in ("a", "b", "c"):
        simulation.add(name, prompt_of(4, ord(name)), max_new_tokens=9)
    simulation.step()
    simulation.add("d", prompt_of(4, ord("d")), max_new_tokens=9)
    for _ in range(4):  # a, b and c hold 2 blocks each; d waits, its block would be one of theirs
        simulation.step()
    assert ids_of(list(simulation.scheduler.waiting)) == ["d"]
    batch = simulation.step()  # a takes the last block; b needs one: c goes, and is in front of d
    assert ids_of(sequences_of(batch)) == ["a", "b"]
    assert ids_of(list(simulation.scheduler.waiting)) == ["c", "d"]
    simulation.scheduler.check_integrity()
    simulation.drain()
    for name, request in simulation.requests.items():
        size = len(request.prompt_token_ids)
        assert simulation.output(name) == [never_eos([0] * n) for n in range(size, size + 9)]


def test_a_sequence_that_is_last_preempts_itself() -> None:
    simulation = make_simulation(num_blocks=3, is_prefix_caching=False)
    simulation.add("a", prompt_of(4, 1), max_new_tokens=8)
    simulation.add("b", prompt_of(3, 2), max_new_tokens=8)
    simulation.step()
    assert ids_of(sequences_of(simulation.step())) == ["a", "b"]  # a takes the third block
    assert ids_of(sequences_of(simulation.step())) == ["a"]  # b has 5 tokens and no block for the fifth
    assert ids_of(list(simulation.scheduler.waiting)) == ["b"]
    simulation.drain()
    assert len(simulation.output("b")) == 8


def test_a_preempted_sequence_finds_its_own_prefix_again() -> None:
    simulation = make_simulation(num_blocks=8)
    simulation.add("a", prompt_of(9), max_new_tokens=4)
    simulation.step()
    simulation.scheduler.preempt(simulation.scheduler.running[0])
    assert scheduled_counts(simulation.step()) == {"a": 2}  # 10 tokens, 8 of them in 2 full blocks
    simulation.drain()
    assert len(simulation.output("a")) == 4


def test_abort_while_waiting() -> None:
    simulation = make_simulation(num_blocks=2)
    simulation.add("a", prompt_of(4, 1))
    simulation.add("b", prompt_of(4, 2))
    simulation.step()
    simulation.scheduler.abort("b")
    assert simulation.scheduler.num_sequences == 1
    simulation.drain()
    assert simulation.events["b"] == []
    assert len(simulation.output("a")) == 4


def test_abort_while_running_frees_its_blocks_at_once() -> None:
    simulation = make_simulation()
    simulation.add("a", prompt_of(20))
    simulation.step(max_tokens=6)
    assert simulation.scheduler.stats().num_used_blocks == 5
    simulation.scheduler.abort("a")
    stats = simulation.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert stats.num_cached_blocks == 1  # 6 tokens were computed: one full block
    assert not simulation.scheduler.has_work


@pytest.mark.parametrize("request_id", ["never seen", "ended"])
def test_abort_of_an_unknown_request_does_nothing(request_id: str) -> None:
    simulation = make_simulation()
    simulation.add("ended", prompt_of(4), max_new_tokens=1)
    simulation.drain()
    simulation.add("a", prompt_of(4))
    simulation.scheduler.abort(request_id)
    assert simulation.scheduler.num_sequences == 1


def test_fail_all_ends_everybody() -> None:
    simulation = make_simulation(num_blocks=2)
    simulation.add("running", prompt_of(4, 1))
    simulation.add("waiting", prompt_of(8, 2))
    simulation.step()
    events = simulation.scheduler.fail_all("boom")
    assert [(event.request_id, event.error) for event in events] == [("running", "boom"), ("waiting", "boom")]
    assert not simulation.scheduler.has_work
    assert simulation.blocks.num_used_blocks == 0


def test_prefix_hits_are_counted_once_for_a_request() -> None:
    simulation = make_simulation(num_blocks=8)
    simulation.add("a", prompt_of(10))
    simulation.step()
    assert simulation.scheduler.stats().num_prefix_hit_tokens == 0
    simulation.add("b", prompt_of(10))
    simulation.step()
    assert simulation.scheduler.stats().num_prefix_hit_tokens == 8
    simulation.scheduler.preempt(simulation.scheduler.running[-1])
    simulation.step()
    assert simulation.scheduler.stats().num_prefix_hit_tokens == 8
    assert simulation.scheduler.num_admissions == 3
    simulation.drain()
    for name, num_cached in (("a", 0), ("b", 8)):
        first, *later = [event.num_cached_tokens for event in simulation.events[name]]
        assert (first, set(later)) == (num_cached, {0})


def test_stats() -> None:
    simulation = make_simulation(num_blocks=8, max_batch_tokens=32)
    simulation.add("a", prompt_of(9, 1))
    simulation.add("b", prompt_of(20, 2))
    simulation.step()
    stats = simulation.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (1, 1, 3)
    assert (stats.num_cached_blocks, stats.num_blocks, stats.block_size) == (0, 8, 4)


def two_that_share_a_prefix() -> Simulation:
    simulation = make_simulation(num_blocks=16)
    simulation.add("a", prompt_of(10), max_new_tokens=9)
    simulation.step()
    simulation.add("b", prompt_of(10), max_new_tokens=9)
    simulation.step()
    simulation.scheduler.check_integrity()
    return simulation


def take_anothers_block(first: Sequence, second: Sequence) -> None:
    second.block_table.append(first.block_table[-1])


def change_a_shared_token(first: Sequence, second: Sequence) -> None:
    second.token_ids[0] += 1


def pretend_another_salt(first: Sequence, second: Sequence) -> None:
    second.cache_salt = b"other"


def lose_a_block(first: Sequence, second: Sequence) -> None:
    del second.block_table[-1]


def arrive_late(first: Sequence, second: Sequence) -> None:
    first.arrival_time = second.arrival_time + 1.0


@pytest.mark.parametrize(
    "damage", [take_anothers_block, change_a_shared_token, pretend_another_salt, lose_a_block, arrive_late]
)
def test_the_check_of_integrity_sees_damage(damage: Callable[[Sequence, Sequence], None]) -> None:
    scheduler = two_that_share_a_prefix().scheduler
    damage(*scheduler.running)
    with pytest.raises(AssertionError):
        scheduler.check_integrity()
