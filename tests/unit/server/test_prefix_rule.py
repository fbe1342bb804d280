"""The routing rule of the replicas, how prompts become its blocks, and the metrics of all replicas."""

from __future__ import annotations

import json
import random

from hypothesis import given
from hypothesis import strategies as st

from server.replicas.metrics import merge_metrics
from server.replicas.prefix_rule import MAX_LEAD, PrefixRule
from server.replicas.prompt_blocks import BLOCK_BYTES, MAX_BLOCKS, prompt_blocks

NAMES = "abcdefgh"
loads_of_replicas = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 100), min_size=1)
paths = st.lists(st.sampled_from([b"0", b"1"]), max_size=6).map(
    lambda steps: [b"".join(steps[: n + 1]) for n in range(len(steps))]
)
"""Chained hashes: a block stands for itself and all before it."""


def rule(**options: int) -> PrefixRule:
    return PrefixRule(**{"capacity": 1_000, "seed": 0, **options})


def blocks(*words: str) -> list[bytes]:
    return [" ".join(words[: n + 1]).encode() for n in range(len(words))]


@given(loads_of_replicas, st.lists(st.tuples(st.sampled_from(NAMES), paths)), paths)
def test_the_choice_is_a_replica_that_may_be_chosen_and_never_far_behind(
    loads: dict[str, int], history: list[tuple[str, list[bytes]]], prompt: list[bytes]
) -> None:
    """It never has the most requests alone, unless it knows a prefix and leads by no more than that is worth."""
    chooser = rule()
    for name, path in history:
        chooser.remember(name, path)
    chosen = chooser.choose(prompt, loads)
    others = [load for name, load in loads.items() if name != chosen]
    assert chosen in loads
    assert not others or loads[chosen] <= max(others) + MAX_LEAD


@given(loads_of_replicas, paths, st.integers(0, 1_000))
def test_without_a_known_prefix_the_lighter_of_two_is_chosen(
    loads: dict[str, int], prompt: list[bytes], seed: int
) -> None:
    chosen = rule(seed=seed).choose(prompt, loads)
    pair = random.Random(seed).sample(list(loads), min(2, len(loads)))
    assert chosen == min(pair, key=loads.__getitem__)


@given(st.lists(st.tuples(st.sampled_from(NAMES), paths), max_size=50), st.integers(1, 8))
def test_memory_is_bound_and_goes_with_the_replicas(history: list[tuple[str, list[bytes]]], max_blocks: int) -> None:
    chooser = rule(max_blocks=max_blocks)
    for name, path in history:
        chooser.remember(name, path)
    assert chooser.num_blocks <= max_blocks * len(NAMES)
    chooser.keep({"a"})
    assert chooser.num_blocks <= max_blocks
    chooser.keep(())
    assert chooser.num_blocks == 0


def test_the_longest_known_prefix_wins() -> None:
    chooser = rule()
    chooser.remember("a", blocks("x"))
    chooser.remember("b", blocks("x", "y"))
    chooser.remember("c", blocks("z", "y", "w"))
    assert {chooser.choose(blocks("x", "y", "w"), dict.fromkeys(NAMES, 0)) for _ in range(20)} == {"b"}


def test_a_prefix_is_worth_a_lead_of_its_part_of_the_prompt() -> None:
    chooser = rule(max_lead=8)
    chooser.remember("a", blocks("x", "y"))
    prompt = blocks("x", "y", "z", "w")
    assert chooser.choose(prompt, {"a": 4, "b": 0}) == "a"
    assert {chooser.choose(prompt, {"a": 5, "b": 0}) for _ in range(20)} == {"b"}
    assert chooser.choose(blocks("x", "y"), {"a": 8, "b": 0}) == "a"


def test_a_full_replica_gets_no_more_while_another_one_is_not_full() -> None:
    chooser = rule(capacity=4)
    chooser.remember("a", blocks("x"))
    assert chooser.choose(blocks("x"), {"a": 4, "b": 3}) == "b"
    assert chooser.choose(blocks("x"), {"a": 4, "b": 4}) == "a"


def test_a_replica_that_is_not_there_holds_nothing() -> None:
    chooser = rule()
    chooser.remember("a", blocks("x", "y"))
    chooser.remember("b", blocks("x"))
    assert chooser.choose(blocks("x", "y"), {"b": 2, "c": 0}) == "b"


def test_the_deepest_blocks_are_forgotten_first() -> None:
    chooser = rule(max_blocks=3)
    chooser.remember("a", blocks("x", "y"))
    chooser.remember("a", blocks("z", "y"))
    assert chooser.choose(blocks("x"), {"a": 3, "b": 0}) == "a"
    assert chooser.num_blocks == 3


@given(st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=12))
def test_the_next_turn_of_a_chat_begins_with_the_blocks_of_the_last_one(texts: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    last = prompt_blocks(json.dumps({"messages": messages, "stream": True}).encode())
    following = json.dumps({"max_tokens": 3, "messages": [*messages, {"role": "user", "content": "more"}]}).encode()
    num_same = len(last) - 1 if last else 0  # the end of the list of messages is in the last block
    assert prompt_blocks(following)[:num_same] == last[:num_same]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_and_less_than_a_block_is_none(body: bytes) -> None:
    assert prompt_blocks(body) == []


def test_other_bodies_have_no_blocks_and_long_ones_not_too_many() -> None:
    deep = b'{"inputs": ' + b"[" * 100_000
    for body in (b"", b"[]", b"3", b'{"inputs"', b'{"model": "x"}', b"\xff\xfe", deep):
        assert prompt_blocks(body) == []
    long = json.dumps({"inputs": "x" * (MAX_BLOCKS + 9) * BLOCK_BYTES}).encode()
    assert len(prompt_blocks(long)) == MAX_BLOCKS


def test_prompts_of_other_keys_differ() -> None:
    text = "y" * 3 * BLOCK_BYTES
    bodies = [{"inputs": text}, {"prompt": text, "system": "short"}, {"messages": [{"role": "user", "content": text}]}]
    first = {tuple(prompt_blocks(json.dumps(body).encode())[:1]) for body in bodies}
    assert len(first) == len(bodies)


def test_metrics_of_replicas_stand_together_by_family() -> None:
    text = '# HELP n N\n# TYPE n counter\nn 1\n# HELP h H\n# TYPE h histogram\nh_bucket{le="+Inf"} 2\nh_sum 0.5\n'
    assert merge_metrics([("a", text), ("b", text)]).splitlines() == [
        "# HELP n N",
        "# TYPE n counter",
        'n{replica="a"} 1',
        'n{replica="b"} 1',
        "# HELP h H",
        "# TYPE h histogram",
        'h_bucket{replica="a",le="+Inf"} 2',
        'h_sum{replica="a"} 0.5',
        'h_bucket{replica="b",le="+Inf"} 2',
        'h_sum{replica="b"} 0.5',
    ]
