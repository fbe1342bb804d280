"""What is known of the KV blocks' content: full blocks are found by their hash, all by the tokens they begin with.

Plain Python over ids and hashes. A block is in the index from the time when its content may be used by others until it
is needed for something else.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

MAX_CANDIDATES = 32
"""Blocks that are looked at for the longest common beginning, the latest first: there may be thousands."""


class Place(NamedTuple):
    """All that the KV of a block depends on beside its own tokens."""

    salt: bytes
    parent: bytes
    """The hash of the block before; empty for a first block."""


class BlockIndex:
    """The content of published blocks."""

    def __init__(self, *, has_beginnings: bool) -> None:
        """Without `has_beginnings` only full blocks are found."""
        self._has_beginnings = has_beginnings
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._content_of: dict[int, tuple[Place, list[int]]] = {}
        self._candidates: dict[tuple[Place, int], dict[int, None]] = {}
        """Blocks by their place and first token, the latest last."""

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of or block in self._content_of

    def find(self, digest: bytes) -> int | None:
        """The full block of that hash."""
        return self._block_of.get(digest)

    def find_beginning(self, place: Place, token_ids: list[int]) -> tuple[int, int]:
        """The block at `place` that has most of the first `token_ids`, and how many; of equal ones the latest.

        (-1, 0) where no block begins like that.
        """
        best = -1, 0
        if self._has_beginnings and token_ids:
            candidates = self._candidates.get((place, token_ids[0]), {})
            for block in itertools.islice(reversed(candidates), MAX_CANDIDATES):
                num_common = _count_common(token_ids, self._content_of[block][1])
                if num_common > best[1]:
                    best = block, num_common
        return best

    def add_full(self, block: int, digest: bytes, place: Place, token_ids: list[int]) -> None:
        """Let a block be found, unless there is one of the same content."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest
            self._add_content(block, place, token_ids)

    def add_part(self, block: int, place: Place, token_ids: list[int]) -> None:
        """Let a block be found that has `token_ids` and nothing after them, unless another one has them, too."""
        if self.find_beginning(place, token_ids)[1] < len(token_ids):
            self._add_content(block, place, token_ids)

    def drop(self, block: int) -> None:
        """Let a block be found no more; one that isn't known changes nothing."""
        if (digest := self._digest_of.pop(block, None)) is not None:
            del self._block_of[digest]
        if (content := self._content_of.pop(block, None)) is not None:
            place, token_ids = content
            candidates = self._candidates[place, token_ids[0]]
            del candidates[block]
            if not candidates:
                del self._candidates[place, token_ids[0]]

    def check_integrity(self) -> None:
        """Check what holds between any two operations. For tests. Raises AssertionError."""
        assert self._block_of == {digest: block for block, digest in self._digest_of.items()}
        listed = {block: key for key, blocks in self._candidates.items() for block in blocks}
        assert listed == {block: (place, ids[0]) for block, (place, ids) in self._content_of.items()}
        assert all(self._candidates.values()), "an empty list is kept"

    def _add_content(self, block: int, place: Place, token_ids: list[int]) -> None:
        if self._has_beginnings:
            self._content_of[block] = place, token_ids
            self._candidates.setdefault((place, token_ids[0]), {})[block] = None


def _count_common(first: list[int], second: list[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
