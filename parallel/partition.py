"""How outputs, inputs, heads and rows of the vocabulary are split over the ranks: plain arithmetic on counts.

A shard is a slice of the whole. There is one per rank, in order. Shards differ by at most one unit; a unit is what
can't be cut (a group of quantized weights, a head).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

UNITS = (64, 32, 16, 8)
"""Features that stay together where nothing larger must: whole words of every packing, whole registers of the kernels,
and from 64 on whole groups of rounded activations."""


class SplitError(ValueError):
    """A size that can't be split over so many ranks; the text says what is too small."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeadShard:
    """The query heads of one rank, and the KV heads they attend with; every KV head serves equally many of them."""

    heads: slice
    kv_heads: slice

    @property
    def num_heads(self) -> int:
        return length(self.heads)

    @property
    def num_kv_heads(self) -> int:
        return length(self.kv_heads)


def length(shard: slice) -> int:
    size: int = shard.stop - shard.start
    return size


def lengths(shards: Iterable[slice]) -> list[int]:
    return [length(shard) for shard in shards]


def scaled(shard: slice, size: int) -> slice:
    """The features of a shard of heads of `size` features each."""
    return slice(shard.start * size, shard.stop * size)


def split_units(total: int, size: int, unit: int = 1) -> list[slice]:
    """Split `total` over `size` ranks in whole units; the first ranks get one more, the last unit may be short.

    Raises SplitError if a rank would get nothing.
    """
    num_units = -(-total // unit)
    if num_units < size:
        raise SplitError(f"{total} in units of {unit} are too few for {size} shards")
    units_each, rest = divmod(num_units, size)
    ends = [unit * (rank * units_each + min(rank, rest)) for rank in range(size + 1)]
    return [slice(start, min(end, total)) for start, end in zip(ends, ends[1:], strict=False)]


def split_features(total: int, size: int, units: Sequence[int] = UNITS) -> list[slice]:
    """Split features in the first of `units` that divides them and leaves every rank something. Raises SplitError.

    One rank gets all of them, whatever their number.
    """
    if size == 1:
        return [slice(0, total)]
    for unit in units:
        if total % unit == 0 and total // unit >= size:
            return split_units(total, size, unit)
    raise SplitError(f"{total} can't be split over {size} shards in units of {' or '.join(map(str, units))}")


def split_rows(total: int, size: int) -> list[slice]:
    """Split the rows of a vocabulary, which need not divide: the last shard may be short. Raises SplitError."""
    unit = next((unit for unit in UNITS if total // unit >= size), 1)
    return split_units(total, size, unit)


def split_heads(num_heads: int, num_kv_heads: int, size: int) -> list[HeadShard]:
    """Split query heads together with their KV heads.

    With as many KV heads as ranks or more, every rank gets whole groups. With fewer, each KV head goes to several ranks
    and its query heads are split over them: 14 heads on 2 KV heads over 3 ranks are 4 + 3 of the first KV head and 7
    of the second. Raises SplitError where a rank would get no head, or heads don't divide into groups.
    """
    if num_heads % num_kv_heads:
        raise SplitError(f"{num_heads} heads don't divide into {num_kv_heads} groups")
    group = num_heads // num_kv_heads
    if num_kv_heads >= size:
        return [HeadShard(scaled(shard, group), shard) for shard in split_units(num_kv_heads, size)]
    shards = []
    for kv_head, ranks in enumerate(split_units(size, num_kv_heads)):
        if length(ranks) > group:
            raise SplitError(
                f"{num_heads} heads in {num_kv_heads} groups of {group} are too few for {size} shards: the largest "
                f"count is {num_heads}"
            )
        first = kv_head * group
        shards += [
            HeadShard(slice(first + shard.start, first + shard.stop), slice(kv_head, kv_head + 1))
            for shard in split_units(group, length(ranks))
        ]
    return shards
