"""The simulated fleet, small: the routing rule finds prefixes that other rules don't."""

from __future__ import annotations

from benchmarks.fleet import NUM_TURNS, Fleet


def run_fleet(rule: str) -> Fleet:
    fleet = Fleet(num_replicas=8, num_users=200, think_s=60.0, rule=rule)
    fleet.run(300.0)
    return fleet


def cached_part(fleet: Fleet) -> float:
    return sum(turn.num_cached_tokens for turn, _ in fleet.done) / sum(turn.num_prompt_tokens for turn, _ in fleet.done)


def test_the_rule_finds_what_random_and_round_robin_compute_again() -> None:
    parts = {rule: cached_part(run_fleet(rule)) for rule in ("prefix", "random", "round_robin")}
    assert parts["prefix"] > 0.8
    assert max(parts["random"], parts["round_robin"]) < 0.5


def test_answers_come_once_after_their_first_token_and_in_the_order_of_a_chat() -> None:
    fleet = run_fleet("prefix")
    turns = [(turn.chat, turn.number) for turn, _ in fleet.done]
    assert len(turns) == len(set(turns))
    assert all(turn.sent_s < turn.first_token_s < end for turn, end in fleet.done)
    assert all(0 <= turn.num_cached_tokens <= turn.num_prompt_tokens - 1 for turn, _ in fleet.done)
    assert {turn.number for turn, _ in fleet.done} == set(range(NUM_TURNS))
    chats: dict[int, list[int]] = {}
    for chat, number in turns:
        chats.setdefault(chat, []).append(number)
    assert all(numbers == list(range(len(numbers))) for numbers in chats.values())
