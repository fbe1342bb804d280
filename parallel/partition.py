"""Who gets which outputs, inputs, heads and rows of the vocabulary: plain arithmetic on counts.

A share is a slice of the whole, one per rank, in order. Shares differ by at most one unit; a unit is what can't be cut
(a group of quantised weights, a head).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

UNITS = (64, 32, 16, 8)
"""Features that stay together where nothing larger must: whole words of every packing, whole registers of the kernels,
and from 64 on whole groups of rounded activations."""


class SplitError(ValueError):
    """A size that can't be dealt out to so many ranks; the text says what is too small."""


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


def length(share: slice) -> int:
    size: int = share.stop - share.start
    return size


def lengths(shares: Iterable[slice]) -> list[int]:
    return [length(share) for share in shares]


def scaled(share: slice, size: int) -> slice:
    """The features of a share of heads of `size` features each."""
    return slice(share.start * size, share.stop * size)


def deal(total: int, size: int, unit: int = 1) -> list[slice]:
    """Deal `total` in units to `size` ranks, the first ranks one more; the last unit may be short.

    Raises SplitError if a rank would get nothing.
    """
    num_units = -(-total // unit)
    if num_units < size:
        raise SplitError(f"{total} in units of {unit} are too few for {size} shards")
    least, rest = divmod(num_units, size)
    ends = [unit * (rank * least + min(rank, rest)) for rank in range(size + 1)]
    return [slice(start, min(end, total)) for start, end in zip(ends, ends[1:], strict=False)]


def split_features(total: int, size: int, units: Sequence[int] = UNITS) -> list[slice]:
    """Deal features in the first of `units` that divides them and leaves every rank something. Raises SplitError.

    One rank gets all of them, whatever their number.
    """
    if size == 1:
        return [slice(0, total)]
    for unit in units:
        if total % unit == 0 and total // unit >= size:
            return deal(total, size, unit)
    raise SplitError(f"{total} can't be split over {size} shards in units of {' or '.join(map(str, units))}")


def split_rows(total: int, size: int) -> list[slice]:
    """Deal the rows of a vocabulary, which need not divide: the last share may be short. Raises SplitError."""
    unit = next((unit for unit in UNITS if total // unit >= size), 1)
    return deal(total, size, unit)


def split_heads(num_heads: int, num_kv_heads: int, size: int) -> list[HeadShard]:
    """Deal query heads together with their KV heads.

    With as many KV heads as ranks or more, every rank gets whole groups. With fewer, each KV head goes to several ranks
    and its query heads are dealt among them: 14 heads on 2 KV heads over 3 ranks are 4 + 3 of the first KV head and 7
    of the second. Raises SplitError where a rank would get no head, or heads don't divide into groups.
    """
    if num_heads % num_kv_heads:
        raise SplitError(f"{num_heads} heads don't divide into {num_kv_heads} groups")
    group = num_heads // num_kv_heads
    if num_kv_heads >= size:
        return [HeadShard(scaled(share, group), share) for share in deal(num_kv_heads, size)]
    shares = []
    for kv_head, ranks in enumerate(deal(size, num_kv_heads)):
        if length(ranks) > group:
            raise SplitError(
                f"{num_heads} heads in {num_kv_heads} groups of {group} are too few for {size} shards: the largest "
                f"count is {num_heads}"
            )
        first = kv_head * group
        shares += [
            HeadShard(slice(first + share.start, first + share.stop), slice(kv_head, kv_head + 1))
            for share in deal(group, length(ranks))
        ]
    return shares
