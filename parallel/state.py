"""Which rank this process is. Passed to layers as an argument, never a global."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ParallelState:
    """`rank` of `size` tensor-parallel processes; size 1 is the same code without a collective."""

    rank: int = 0
    size: int = 1

    def shard(self, total: int) -> slice:
        """This rank's share of `total` equal units. Raises ValueError when they cannot be dealt out evenly."""
        if total % self.size:
            raise ValueError(f"{total} cannot be split over {self.size} shards")
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)
