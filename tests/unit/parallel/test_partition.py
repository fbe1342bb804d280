"""Shards cover everything once and in order, are as even as the units allow, and split as a person would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.partition import (
    UNITS,
    SplitError,
    length,
    lengths,
    scaled,
    split_features,
    split_heads,
    split_rows,
    split_units,
)

SIZES = st.integers(1, 16)
GROUPS = st.integers(1, 12)
"""Query heads of a KV head."""


def assert_covers(shards: list[slice], total: int, size: int) -> None:
    assert len(shards) == size
    assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
    assert shards[-1].stop == total
    assert min(lengths(shards)) > 0


@given(st.integers(1, 3000), SIZES, st.sampled_from([1, 2, 8, 30, 64, 128]))
def test_units_are_dealt_once_in_order_and_evenly(total: int, size: int, unit: int) -> None:
    num_units = -(-total // unit)
    if num_units < size:
        with pytest.raises(SplitError, match=f"{total} in units of {unit} are too few for {size} shards"):
            split_units(total, size, unit)
        return
    shards = split_units(total, size, unit)
    assert_covers(shards, total, size)
    assert not any(shard.start % unit for shard in shards)
    counts = [-(-count // unit) for count in lengths(shards)]
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


@given(st.integers(1, 500).map(lambda count: 8 * count) | st.integers(1, 4000), SIZES)
def test_features_are_dealt_in_the_largest_unit_that_fits(total: int, size: int) -> None:
    fitting = [unit for unit in UNITS if total % unit == 0 and total // unit >= size]
    if size > 1 and not fitting:
        message = f"{total} can't be split over {size} shards in units of 64 or 32 or 16 or 8"
        with pytest.raises(SplitError, match=message):
            split_features(total, size)
        return
    shards = split_features(total, size)
    assert_covers(shards, total, size)
    assert size == 1 or shards == split_units(total, size, fitting[0])


def test_one_rank_takes_any_number_of_features() -> None:
    assert split_features(20, 1) == [slice(0, 20)]


@given(st.integers(1, 10_000), SIZES)
def test_rows_are_dealt_whatever_their_number(total: int, size: int) -> None:
    if total < size:
        with pytest.raises(SplitError, match="too few"):
            split_rows(total, size)
        return
    shards = split_rows(total, size)
    assert_covers(shards, total, size)
    unit = next((unit for unit in UNITS if total >= unit * size), 1)
    assert not any(shard.start % unit for shard in shards)
    assert max(lengths(shards)) - min(lengths(shards)) < 2 * unit


@given(GROUPS, st.integers(1, 12), SIZES)
def test_heads_sit_with_their_kv_heads(group: int, num_kv_heads: int, size: int) -> None:
    num_heads = group * num_kv_heads
    if -(-size // num_kv_heads) > group:  # ranks of the busiest KV head
        with pytest.raises(SplitError, match=f"too few for {size} shards: the largest count is {num_heads}"):
            split_heads(num_heads, num_kv_heads, size)
        return
    shards = split_heads(num_heads, num_kv_heads, size)
    assert_covers([shard.heads for shard in shards], num_heads, size)
    kv_heads = [range(shard.kv_heads.start, shard.kv_heads.stop) for shard in shards]
    assert [head for own in kv_heads for head in own] == sorted(head for own in kv_heads for head in own)
    assert {head for own in kv_heads for head in own} == set(range(num_kv_heads))
    for shard, own in zip(shards, kv_heads, strict=True):
        assert (shard.num_heads, shard.num_kv_heads) == (length(shard.heads), len(own))
        assert shard.num_heads % shard.num_kv_heads == 0
        served = shard.num_heads // shard.num_kv_heads
        for index, head in enumerate(range(shard.heads.start, shard.heads.stop)):
            # the attention kernels take KV head `index // served` of the rank
            assert own[index // served] == head // group


@given(GROUPS, st.integers(1, 12), SIZES)
def test_heads_are_dealt_evenly(group: int, num_kv_heads: int, size: int) -> None:
    """Ranks get whole groups where there are enough; else groups get ranks, which split the heads of their group."""
    try:
        shards = split_heads(group * num_kv_heads, num_kv_heads, size)
    except SplitError:
        assert size > num_kv_heads
        return
    if size <= num_kv_heads:
        counts = [shard.num_kv_heads for shard in shards]
        assert max(counts) - min(counts) <= 1
        return
    by_kv_head = [
        [shard.num_heads for shard in shards if shard.kv_heads.start == kv_head] for kv_head in range(num_kv_heads)
    ]
    assert all(max(counts) - min(counts) <= 1 for counts in by_kv_head)
    num_ranks = [len(counts) for counts in by_kv_head]
    assert max(num_ranks) - min(num_ranks) <= 1


def test_heads_that_make_no_groups() -> None:
    with pytest.raises(SplitError, match="14 heads don't divide into 4 groups"):
        split_heads(14, 4, 2)


def test_more_ranks_than_heads() -> None:
    with pytest.raises(SplitError, match="4 heads in 2 groups of 2 are too few for 5 shards: the largest count is 4"):
        split_heads(4, 2, 5)


HEADS = {
    "0.5B": (14, 2),
    "1.5B": (12, 2),
    "7B": (28, 4),
    "72B": (64, 8),
}


@pytest.mark.parametrize(
    ("model", "num_heads_by_rank", "num_kv_heads_by_rank"),
    [
        ("0.5B", [14], [2]),
        ("0.5B", [7, 7], [1, 1]),
        ("0.5B", [4, 3, 7], [1, 1, 1]),
        ("0.5B", [4, 3, 4, 3], [1] * 4),
        ("0.5B", [3, 2, 2, 4, 3], [1] * 5),
        ("0.5B", [2, 2, 2, 1, 3, 2, 2], [1] * 7),
        ("0.5B", [2, 2, 2, 1, 2, 2, 2, 1], [1] * 8),
        ("1.5B", [3, 3, 6], [1, 1, 1]),
        ("1.5B", [2, 2, 2, 2, 2, 2], [1] * 6),
        ("1.5B", [2, 2, 1, 1, 2, 2, 1, 1], [1] * 8),
        ("7B", [14, 14], [2, 2]),
        ("7B", [14, 7, 7], [2, 1, 1]),
        ("7B", [7, 7, 7, 7], [1] * 4),
        ("7B", [4, 3, 7, 7, 7], [1] * 5),
        ("7B", [4, 3, 4, 3, 4, 3, 4, 3], [1] * 8),
        ("72B", [24, 24, 16], [3, 3, 2]),
        ("72B", [16, 8, 8, 8, 8, 8, 8], [2, 1, 1, 1, 1, 1, 1]),
        ("72B", [8] * 8, [1] * 8),
    ],
)
def test_heads_of_qwen2(model: str, num_heads_by_rank: list[int], num_kv_heads_by_rank: list[int]) -> None:
    shards = split_heads(*HEADS[model], len(num_heads_by_rank))
    assert [shard.num_heads for shard in shards] == num_heads_by_rank
    assert [shard.num_kv_heads for shard in shards] == num_kv_heads_by_rank


@pytest.mark.parametrize(
    ("intermediate_size", "groups_by_rank"),
    [
        (4864, [19, 19]),
        (4864, [13, 13, 12]),
        (4864, [6, 6, 6, 5, 5, 5, 5]),
        (4864, [5, 5, 5, 5, 5, 5, 4, 4]),
        (8960, [35, 35]),
        (8960, [24, 23, 23]),
        (8960, [9, 9, 9, 9, 9, 9, 8, 8]),
        (18944, [74, 74]),
        (18944, [50, 49, 49]),
        (18944, [22, 21, 21, 21, 21, 21, 21]),
        (18944, [19, 19, 19, 19, 18, 18, 18, 18]),
        (29568, [116, 115]),
        (29568, [33] * 7),
        (29568, [29, 29, 29, 29, 29, 29, 29, 28]),
    ],
)
def test_intermediate_features_of_qwen2_in_groups_of_128(intermediate_size: int, groups_by_rank: list[int]) -> None:
    shards = split_features(intermediate_size, len(groups_by_rank), (128, *UNITS))
    assert lengths(shards) == [128 * groups for groups in groups_by_rank]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [151_936]),
        (2, [75_968, 75_968]),
        (3, [50_688, 50_624, 50_624]),
        (4, [38_016, 38_016, 37_952, 37_952]),
        (8, [19_008] * 6 + [18_944] * 2),
    ],
)
def test_rows_of_qwen2s_vocabulary(size: int, expected: list[int]) -> None:
    assert sum(expected) == 151_936
    assert lengths(split_rows(151_936, size)) == expected


def test_a_vocabulary_that_does_not_divide_has_a_short_last_share() -> None:
    assert lengths(split_rows(523, 3)) == [192, 192, 139]
    assert lengths(split_rows(523, 8)) == [128, 64, 64, 64, 64, 64, 64, 11]


def test_scaled() -> None:
    assert scaled(slice(3, 7), 64) == slice(192, 448)
