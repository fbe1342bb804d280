"""The routing rule: the replica with the longest known prefix of the prompt, unless it is behind a lighter one.

The rule knows hashes of prefix blocks, names of replicas and numbers of requests. It knows neither Ray nor HTTP.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

MAX_BLOCKS = 65_536
"""Blocks that the rule remembers of one replica."""
MAX_LEAD = 16
"""Requests that a replica which knows the whole prompt may have more than another one."""


class PrefixRule:
    """Which replica gets a request. One owner calls it; it is not thread-safe."""

    def __init__(
        self, *, capacity: int, max_lead: int = MAX_LEAD, max_blocks: int = MAX_BLOCKS, seed: int | None = None
    ) -> None:
        """A replica with `capacity` requests gets no more while the other candidate has fewer."""
        self._capacity = capacity
        self._max_lead = max_lead
        self._max_blocks = max_blocks
        self._random = random.Random(seed)
        self._holders: dict[bytes, dict[str, None]] = {}
        self._blocks: dict[str, OrderedDict[bytes, None]] = {}

    def choose(self, blocks: Sequence[bytes], loads: Mapping[str, int]) -> str:
        """One of `loads`, which has the requests of every replica that may be chosen.

        The lighter of two random replicas gets the request, unless one knows a prefix of it and leads by little. The
        lead that a prefix is worth is its part of the prompt.
        """
        lighter = self._lighter(list(loads), loads)
        num_known, holders = self._longest_known(blocks, loads)
        if not holders:
            return lighter
        holder = self._lighter(holders, loads)
        max_lead = self._max_lead * num_known / len(blocks)
        is_full = loads[holder] >= self._capacity > loads[lighter]
        return lighter if is_full or loads[holder] - loads[lighter] > max_lead else holder

    def remember(self, replica: str, blocks: Sequence[bytes]) -> None:
        """`replica` computes a prompt of these blocks. Beyond `max_blocks` the oldest ones are forgotten."""
        held = self._blocks.setdefault(replica, OrderedDict())
        for block in reversed(blocks):  # so that a block is never forgotten before those that follow it
            held[block] = None
            held.move_to_end(block)
            self._holders.setdefault(block, {})[replica] = None
        while len(held) > self._max_blocks:
            self._drop(replica, held.popitem(last=False)[0])

    def keep(self, replicas: Collection[str]) -> None:
        """Forget every replica that is not one of these."""
        for replica in [name for name in self._blocks if name not in replicas]:
            for block in self._blocks.pop(replica):
                self._drop(replica, block)

    @property
    def num_blocks(self) -> int:
        """Distinct blocks that are remembered."""
        return len(self._holders)

    def _drop(self, replica: str, block: bytes) -> None:
        holders = self._holders[block]
        del holders[replica]
        if not holders:
            del self._holders[block]

    def _longest_known(self, blocks: Sequence[bytes], loads: Mapping[str, int]) -> tuple[int, list[str]]:
        """The number of leading blocks that some of the replicas know, and who they are."""
        for index in reversed(range(len(blocks))):
            holders = [name for name in self._holders.get(blocks[index], ()) if name in loads]
            if holders:
                return index + 1, holders
        return 0, []

    def _lighter(self, names: list[str], loads: Mapping[str, int]) -> str:
        """The power of two choices."""
        pair = self._random.sample(names, min(2, len(names)))
        return min(pair, key=lambda name: loads[name])
