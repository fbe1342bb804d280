"""Blocks by example: sharing, reuse, what is given up first. The random histories are in test_scheduler_properties."""

from __future__ import annotations

import hashlib
from array import array

from engine.scheduling.block_manager import BlockManager, hash_block
from engine.scheduling.sequence import Sequence
from tests.unit.engine.builders import make_request

BLOCK_SIZE = 4


def make_sequence(prompt: list[int], cache_salt: bytes = b"") -> Sequence:
    return Sequence(make_request("any", prompt), arrival_time=0.0, cache_salt=cache_salt)


def computed(blocks: BlockManager, prompt: list[int], cache_salt: bytes = b"") -> Sequence:
    """A sequence whose whole prompt is computed."""
    sequence = make_sequence(prompt, cache_salt)
    assert blocks.admit(sequence)
    before = sequence.num_computed_tokens
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.publish_full_blocks(sequence, before, sequence.num_computed_tokens)
    return sequence


def test_a_hash_tells_ids_order_and_parent_apart() -> None:
    digests = [hash_block(parent, ids) for parent in (b"", b"p" * 16) for ids in ([1, 2], [2, 1], [1, 3], [1, 258])]
    assert len(set(digests)) == 8
    assert hash_block(b"", [1, 258]) == hashlib.blake2b(bytes([1, 0, 0, 0, 2, 1, 0, 0]), digest_size=16).digest()


def test_sequences_with_different_salts_never_share_a_block() -> None:
    prompt = list(range(13))
    plain = computed(BlockManager(8, BLOCK_SIZE), prompt)
    # A salt that looks like another sequence's first hash, or like ids before the block, is no way in either.
    salts = [b"", b"a", b"b", b"a\0", bytes(16), plain.block_hashes[0], b"a" * 64]
    blocks = BlockManager(4 * len(salts), BLOCK_SIZE)
    sequences = [computed(blocks, prompt, salt) for salt in salts]
    assert [sequence.num_cached_tokens for sequence in sequences] == [0] * len(salts)
    assert len({block for sequence in sequences for block in sequence.block_table}) == 4 * len(salts)
    assert len({digest for sequence in sequences for digest in sequence.block_hashes}) == 3 * len(salts)
    assert sequences[0].block_hashes == plain.block_hashes
    for sequence in sequences:
        blocks.free(sequence)
    for salt in salts:
        again = make_sequence(prompt, salt)
        assert blocks.admit(again)
        assert again.num_cached_tokens == 12
        blocks.free(again)


def test_a_salted_suffix_is_not_a_salted_prefix() -> None:
    """The chain of one salt does not go on into another's, even where the ids do."""
    blocks = BlockManager(8, BLOCK_SIZE)
    first = computed(blocks, list(range(9)), b"a")
    other = make_sequence(list(range(4, 13)), first.block_hashes[0])
    assert blocks.admit(other)
    assert other.num_cached_tokens == 0


def test_sequences_share_the_full_blocks_of_a_common_prefix() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    first = computed(blocks, [*range(8), 100, 101])
    second = make_sequence([*range(8), 200, 201, 202])
    assert blocks.admit(second)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert second.num_computed_tokens == second.num_cached_tokens == 8
    assert blocks.num_used_blocks == 4


def test_a_prefix_must_match_from_the_start() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    computed(blocks, [0, 1, 2, 3, 4, 5, 6, 7])
    other = make_sequence([9, 1, 2, 3, 4, 5, 6, 7, 8])
    assert blocks.admit(other)
    assert other.num_cached_tokens == 0


def test_the_last_token_is_always_computed() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    first = computed(blocks, list(range(8)))
    again = make_sequence(list(range(8)))
    assert blocks.admit(again)
    assert again.num_cached_tokens == 4
    assert again.block_table[1] != first.block_table[1]


def test_a_block_that_is_not_full_yet_is_not_shared() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    first = make_sequence(list(range(9)))
    assert blocks.admit(first)
    first.num_computed_tokens = 7
    blocks.publish_full_blocks(first, 0, first.num_computed_tokens)
    second = make_sequence(list(range(9)))
    assert blocks.admit(second)
    assert second.num_cached_tokens == 4


def test_a_block_that_is_filled_in_several_steps_is_shared() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    first = make_sequence(list(range(9)))
    assert blocks.admit(first)
    for before, after in ((0, 3), (3, 6), (6, 7), (7, 8)):
        first.num_computed_tokens = after
        blocks.publish_full_blocks(first, before, first.num_computed_tokens)
    second = make_sequence(list(range(9)))
    assert blocks.admit(second)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.num_cached_tokens == 8


def test_freed_blocks_are_found_again_and_counted() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    first = computed(blocks, list(range(10)))
    table = first.block_table
    blocks.free(first)
    assert (blocks.num_used_blocks, blocks.num_cached_blocks) == (0, 2)
    assert (list(first.block_table), first.num_computed_tokens) == ([], 0)
    again = make_sequence(list(range(10)))
    assert blocks.admit(again)
    assert again.block_table[:2] == table[:2]
    assert (blocks.num_used_blocks, blocks.num_cached_blocks) == (3, 0)


def test_blocks_without_a_hash_are_taken_first_then_the_least_recently_used() -> None:
    blocks = BlockManager(6, BLOCK_SIZE)
    old, new = computed(blocks, [*range(8), 1]), computed(blocks, [*range(50, 58), 1])
    old_table, new_table = old.block_table, new.block_table
    blocks.free(old)
    blocks.free(new)
    taker = make_sequence([99] * 24)
    assert blocks.admit(taker)
    # The two partial blocks, then the end of the old prefix before its beginning, then the new one.
    assert set(taker.block_table[:2]) == {old_table[2], new_table[2]}
    assert list(taker.block_table[2:]) == [old_table[1], old_table[0], new_table[1], new_table[0]]
    assert blocks.num_cached_blocks == 0


def test_a_block_that_is_taken_is_no_longer_found() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    first = computed(blocks, list(range(9)))
    blocks.free(first)
    blocks.free(computed(blocks, [99] * 8))  # takes the partial block and the end of the prefix
    again = make_sequence(list(range(9)))
    assert blocks.admit(again)
    assert again.num_cached_tokens == 4


def test_admission_that_does_not_fit_changes_nothing() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    first = computed(blocks, list(range(8)))
    large = make_sequence([*range(8), *range(70, 77)])  # shares one... two full blocks, needs 2 more: 2 are free
    assert not blocks.admit(large, num_spare_blocks=1)
    assert (list(large.block_table), large.num_computed_tokens) == ([], 0)
    assert (blocks.num_used_blocks, blocks.num_holders(first.block_table[0])) == (2, 1)
    assert blocks.admit(large)
    assert large.num_cached_tokens == 8


def test_cached_blocks_that_are_revived_do_not_count_as_free() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    blocks.free(computed(blocks, list(range(8))))
    sequence = make_sequence([*range(8), 1, 2, 3, 4, 5])  # 4 blocks, 2 of them cached: one too many
    assert not blocks.admit(sequence)
    assert blocks.num_cached_blocks == 2


def test_grow_takes_a_block_only_at_a_block_edge() -> None:
    blocks = BlockManager(2, BLOCK_SIZE)
    sequence = computed(blocks, [1, 2, 3])
    tables = []
    for _ in range(5):
        sequence.token_ids.append(5)
        assert blocks.grow(sequence)
        tables.append(len(sequence.block_table))
    assert tables == [1, 2, 2, 2, 2]
    sequence.token_ids.append(5)
    assert not blocks.grow(sequence)
    assert len(sequence.block_table) == 2


def test_blocks_that_are_withdrawn_are_found_no_more() -> None:
    """Whoever else holds them goes on, and what it fills is not found without them."""
    blocks = BlockManager(8, BLOCK_SIZE)
    first, second = (computed(blocks, list(range(9))) for _ in range(2))
    blocks.withdraw_blocks(second)
    blocks.check_integrity([first, second])
    third = make_sequence(list(range(9)))
    assert blocks.admit(third)
    assert third.num_cached_tokens == 0
    for sequence in (first, second, third):
        blocks.free(sequence)
    assert blocks.num_cached_blocks == 0
    blocks.check_integrity([])


def test_equal_blocks_computed_side_by_side_are_published_once() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    sequences = [make_sequence(list(range(9))) for _ in range(2)]
    assert all(blocks.admit(sequence) for sequence in sequences)
    for sequence in sequences:
        sequence.num_computed_tokens = 9
        blocks.publish_full_blocks(sequence, 0, sequence.num_computed_tokens)
    assert sequences[0].block_table[0] != sequences[1].block_table[0]
    for sequence in sequences:
        blocks.free(sequence)
    assert blocks.num_cached_blocks == 2


def test_prefix_caching_can_be_off() -> None:
    blocks = BlockManager(8, BLOCK_SIZE, is_prefix_caching=False)
    blocks.free(computed(blocks, list(range(8))))
    assert blocks.num_cached_blocks == 0
    again = computed(blocks, list(range(8)))
    assert again.num_cached_tokens == 0


def copying(num_blocks: int) -> BlockManager:
    return BlockManager(num_blocks, BLOCK_SIZE, is_copying=True)


def ended(blocks: BlockManager, token_ids: list[int]) -> array[int]:
    """The blocks of a sequence that computed all of its tokens and is gone."""
    sequence = computed(blocks, token_ids)
    table = sequence.block_table
    blocks.publish_last_block(sequence)
    blocks.end_copy(sequence)
    blocks.free(sequence)
    return table


def test_the_beginning_of_a_block_is_reused_by_a_copy() -> None:
    blocks = copying(8)
    table = ended(blocks, [*range(8), 100, 101])
    longer, forked = make_sequence([*range(8), 100, 101, 102]), make_sequence([*range(6), 50, 51])
    assert blocks.admit(longer)
    assert blocks.admit(forked)
    assert (longer.num_cached_tokens, longer.block_copy) == (10, (table[2], longer.block_table[2]))
    assert (forked.num_cached_tokens, forked.block_copy) == (6, (table[1], forked.block_table[1]))
    blocks.check_integrity([longer, forked])


def test_a_prompt_that_comes_again_computes_its_last_token_alone() -> None:
    blocks = copying(8)
    ended(blocks, list(range(8)))
    again = make_sequence(list(range(8)))
    assert blocks.admit(again)
    assert again.num_cached_tokens == 7


def test_the_longest_beginning_is_copied_and_of_equal_ones_the_latest() -> None:
    blocks = copying(8)
    for rest in ([1, 9], [1, 2, 8], [1, 2, 7], [1]):
        ended(blocks, rest)
    assert blocks.num_cached_blocks == 3, "a block that says nothing new is not kept"
    sequence = make_sequence([1, 2, 3, 4])
    assert blocks.admit(sequence)
    assert sequence.num_cached_tokens == 2
    last = make_sequence([1, 2, 7, 7])
    assert blocks.admit(last)
    assert last.num_cached_tokens == 3
    assert sequence.block_copy is not None and last.block_copy is not None
    assert sequence.block_copy[0] == last.block_copy[0]


def test_a_block_stays_until_it_is_copied() -> None:
    blocks = copying(3)
    (source,) = ended(blocks, [1, 2, 3])
    first = make_sequence([1, 2, 9])
    assert blocks.admit(first)
    other = make_sequence([7] * 8)
    assert not blocks.admit(other), "one block is taken, one is to be copied"
    blocks.end_copy(first)
    assert blocks.admit(other)
    assert source in other.block_table


def test_without_place_for_block_and_copy_nothing_is_copied() -> None:
    blocks = copying(2)
    ended(blocks, [1, 2, 3])
    sequence = make_sequence([1, 2, 9, 9, 9])
    assert blocks.admit(sequence)
    assert (sequence.num_cached_tokens, sequence.block_copy) == (0, None)


def test_a_sequence_that_goes_before_its_step_lets_the_block_go() -> None:
    blocks = copying(3)
    ended(blocks, [1, 2, 3])
    sequence = make_sequence([1, 2, 9])
    assert blocks.admit(sequence)
    blocks.free(sequence)
    assert (blocks.num_used_blocks, blocks.num_cached_blocks) == (0, 1)
    blocks.check_integrity([])


def test_beginnings_are_not_shared_between_salts() -> None:
    blocks = copying(8)
    ended(blocks, [1, 2, 3])
    salted = make_sequence([1, 2, 3, 4], b"a")
    assert blocks.admit(salted)
    assert salted.num_cached_tokens == 0


def test_of_many_beginnings_only_the_latest_are_looked_at() -> None:
    blocks = copying(200)
    for number in range(100):
        ended(blocks, [1, number, 5])
    old, new = make_sequence([1, 0, 5, 6]), make_sequence([1, 99, 5, 6])
    assert blocks.admit(old)
    assert blocks.admit(new)
    assert (old.num_cached_tokens, new.num_cached_tokens) == (1, 3)
