"""The KV blocks: which belong to whom, and which can be reused for a known prefix. Plain Python over counts and hashes.

A block is free, or held by one sequence or by several that share a prefix. The content of a free block may still be
known to the index: it is found there until the block is needed for something else, least recently used first. A chain's
end is always less recently used than its beginning, without which it is worth nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection

from engine.scheduling.block_index import BlockIndex, Place
from engine.scheduling.sequence import Sequence

HASH_BYTES = 16


def hash_block(parent: bytes, token_ids: list[int], salt: bytes = b"") -> bytes:
    """BLAKE2b-128 over the parent's hash and the ids, keyed by the salt of 64 bytes at most.

    Digests are equal only for equal prefixes under equal salts, in every process. Raises ValueError for a longer salt.
    """
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=HASH_BYTES, key=salt).digest()


class BlockManager:
    """Hands out the `num_blocks` blocks of `block_size` tokens each."""

    def __init__(
        self, num_blocks: int, block_size: int, *, is_prefix_caching: bool = True, is_copying: bool = False
    ) -> None:
        """With `is_copying` the beginning of a block is reused, too: the step copies the block first."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._is_prefix_caching = is_prefix_caching
        self._num_holders = [0] * num_blocks
        self._index = BlockIndex(has_beginnings=is_copying)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.num_cached_blocks = 0
        """Free blocks whose content can still be reused."""

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks still to be allocated before `sequence` has room for its first `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_table))

    def num_findable_tokens(self, sequence: Sequence) -> int:
        """Tokens in the full blocks that a waiting sequence would reuse if admitted now; a copy may save a few more."""
        return len(self._find_prefix(sequence)) * self.block_size

    def admit(self, sequence: Sequence, *, num_spare_blocks: int = 0) -> bool:
        """Give a waiting sequence room for all its tokens, reusing cached blocks; False (and no change) if it can't.

        `num_spare_blocks` must stay free. The last token is never taken from the cache, because the step needs its
        logits. A request for prompt logprobs takes no token from it, because it needs the logits of all.

        A block that is to be copied is held until `end_copy`.
        """
        reused = self._find_prefix(sequence)
        num_new = -(-sequence.num_tokens // self.block_size) - len(reused)
        num_places = self.num_free_blocks - num_new - num_spare_blocks
        if self._num_revived(reused) > num_places:
            return False
        source, num_copied = self._find_beginning(sequence, len(reused))
        if num_copied and self._num_revived([*reused, source]) > num_places:
            num_copied = 0
        for block in reused:
            self._hold(block)
        if num_copied:
            self._hold(source)
        sequence.block_table = array("i", reused)
        sequence.num_computed_tokens = sequence.num_cached_tokens = len(reused) * self.block_size + num_copied
        self._extend(sequence, num_new)
        if num_copied:
            sequence.block_copy = source, sequence.block_table[len(reused)]
        return True

    def end_copy(self, sequence: Sequence) -> None:
        """Let go of the block that was to be copied for `sequence`, if there is one: the step has copied it."""
        if sequence.block_copy is not None:
            self._release(array("i", sequence.block_copy[:1]))
            sequence.block_copy = None

    def grow(self, sequence: Sequence, num_more: int = 0, *, num_spare_blocks: int = 0) -> bool:
        """Make room for all known tokens and `num_more`; False (and no change) if too few blocks are free.

        `num_spare_blocks` must stay free, unless no block is needed.
        """
        num_missing = self.num_missing_blocks(sequence, sequence.num_tokens + num_more)
        if not num_missing:
            return True
        if num_missing + num_spare_blocks > self.num_free_blocks:
            return False
        self._extend(sequence, num_missing)
        return True

    def shrink(self, sequence: Sequence) -> None:
        """Give back the blocks that no known token of `sequence` needs."""
        num_needed = -(-sequence.num_tokens // self.block_size)
        self._release(sequence.block_table[num_needed:])
        del sequence.block_table[num_needed:]

    def free(self, sequence: Sequence) -> None:
        """Give all blocks of `sequence` back. The end of a prefix is given to other content before its beginning."""
        self.end_copy(sequence)
        self._release(sequence.block_table)
        sequence.block_table = array("i")
        sequence.num_computed_tokens = 0

    def _release(self, blocks: array[int]) -> None:
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                self._free[block] = None
                if block in self._index:
                    self.num_cached_blocks += 1
                else:
                    self._free.move_to_end(block, last=False)

    def publish_full_blocks(self, sequence: Sequence, start: int, end: int) -> None:
        """Make the blocks that were filled by computing the tokens from `start` to `end` findable by others."""
        if not self._is_prefix_caching:
            return
        first, last = start // self.block_size, end // self.block_size
        if first >= last:
            return
        for index, digest in enumerate(self._hashes(sequence, last)[first:], first):
            content = self._place(sequence, index), self._token_ids(sequence, index, end)
            self._index.add_full(sequence.block_table[index], digest, *content)

    def publish_last_block(self, sequence: Sequence) -> None:
        """Make the computed tokens after the last full block findable; `sequence` computes nothing more then."""
        index, num_tokens = divmod(sequence.num_computed_tokens, self.block_size)
        if self._is_prefix_caching and num_tokens:
            content = self._place(sequence, index), self._token_ids(sequence, index, sequence.num_computed_tokens)
            self._index.add_part(sequence.block_table[index], *content)

    def withdraw_blocks(self, sequence: Sequence) -> None:
        """Let nobody find the blocks of `sequence` any more, its prefix included: whoever filled them, it failed."""
        for block in sequence.block_table:
            self._index.drop(block)

    def num_holders(self, block: int) -> int:
        """Sequences that have `block` in their table."""
        return self._num_holders[block]

    def check_integrity(self, sequences: Collection[Sequence]) -> None:
        """Check what holds between any two operations, if `sequences` are all that have blocks. For tests.

        Raises AssertionError.
        """
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        held.update(sequence.block_copy[0] for sequence in sequences if sequence.block_copy is not None)
        assert self._num_holders == [held[block] for block in range(self.num_blocks)], "holders are counted wrongly"
        assert set(self._free) == {block for block in range(self.num_blocks) if not held[block]}
        assert self.num_cached_blocks == sum(block in self._index for block in self._free)
        self._index.check_integrity()
        self._check_sharing(sequences)

    def _check_sharing(self, sequences: Collection[Sequence]) -> None:
        """A block is shared only if it is full, computed, and means the same to all; the rest has one holder."""
        meaning: dict[int, tuple[bytes, list[int]]] = {}
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table), "a block twice in one table"
            assert len(sequence.block_table) * self.block_size >= sequence.num_computed_tokens
            num_full = sequence.num_computed_tokens // self.block_size
            for index, block in enumerate(sequence.block_table):
                if index < num_full:
                    prefix = sequence.cache_salt, sequence.token_ids[: (index + 1) * self.block_size]
                    assert meaning.setdefault(block, prefix) == prefix, "a block stands for two prefixes"
                else:
                    assert self._num_holders[block] == 1, "a block that is not full is shared"
                    assert block not in self._index, "a block that is not full can be found"

    def _may_reuse(self, sequence: Sequence) -> bool:
        return self._is_prefix_caching and not sequence.request.has_prompt_logprobs

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        blocks: list[int] = []
        if self._may_reuse(sequence):
            for digest in self._hashes(sequence, (sequence.num_tokens - 1) // self.block_size):
                block = self._index.find(digest)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def _find_beginning(self, sequence: Sequence, index: int) -> tuple[int, int]:
        """The block to copy for the sequence's block at `index`, and how many tokens that gives; (-1, 0) for none."""
        if not self._may_reuse(sequence):
            return -1, 0
        token_ids = self._token_ids(sequence, index, sequence.num_tokens - 1)
        return self._index.find_beginning(self._place(sequence, index), token_ids)

    def _place(self, sequence: Sequence, index: int) -> Place:
        """What the KV in the sequence's block at `index` depends on beside the block's tokens."""
        self._compute_hashes(sequence, index)
        return Place(sequence.cache_salt, sequence.block_hashes[index - 1] if index else b"")

    def _token_ids(self, sequence: Sequence, index: int, end: int) -> list[int]:
        """The tokens of the sequence's block at `index`, of those before `end`."""
        return sequence.token_ids[index * self.block_size : min(end, (index + 1) * self.block_size)]

    def _num_revived(self, blocks: list[int]) -> int:
        """How many free blocks holding all of `blocks` would take."""
        return sum(1 for block in blocks if not self._num_holders[block])

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        self._compute_hashes(sequence, num_blocks)
        return sequence.block_hashes[:num_blocks]

    def _compute_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        """Let the sequence know the hashes of so many first blocks at least."""
        hashes = sequence.block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, sequence.token_ids[start : start + self.block_size], sequence.cache_salt))

    def _hold(self, block: int) -> None:
        if not self._num_holders[block]:
            del self._free[block]
            self.num_cached_blocks -= 1
        self._num_holders[block] += 1

    def _extend(self, sequence: Sequence, num_blocks: int) -> None:
        for _ in range(num_blocks):
            block, _ = self._free.popitem(last=False)
            if block in self._index:
                self._index.drop(block)
                self.num_cached_blocks -= 1
            self._num_holders[block] = 1
            sequence.block_table.append(block)
