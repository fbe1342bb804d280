"""The split of attention among threads: by its work, not by the number of its tiles."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.attention import cpu, tiles_cpu
from engine.attention.base import AttentionShape
from engine.attention.cpu import MAX_IMBALANCE, NO_WINDOW, CpuAttention
from engine.attention.tiles_cpu import FIRST_PART, LAST_PART, PARTIAL

SHAPES = {"0.5B": AttentionShape(14, 2, 64), "7B": AttentionShape(28, 4, 128), "72B": AttentionShape(64, 8, 128)}
THREADS = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128]


def share(tiles: npt.NDArray[np.int32], *sizes: int) -> Any:
    """Compiled code computes in 64 bits, whatever the array holds."""
    return tiles_cpu.split_items.py_func(tiles.astype(np.int64), *sizes)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here."""
    monkeypatch.setattr(cpu, "split_items", share)


def tiles_of(shape: AttentionShape, num_threads: int, queries: list[int], seq_lens: list[int]) -> npt.NDArray[np.int32]:
    backend = CpuAttention(shape, CpuAttention.block_sizes[0])
    backend._num_threads = num_threads
    return backend.work_items([0, *itertools.accumulate(queries)], seq_lens, 0)


def efficiency(shape: AttentionShape, num_threads: int, queries: list[int], seq_lens: list[int]) -> float:
    tiles = tiles_of(shape, num_threads, queries, seq_lens)
    _, longest, total = share(tiles, shape.num_kv_heads, NO_WINDOW, num_threads)
    return float(total / num_threads / longest)


@pytest.mark.parametrize("num_threads", THREADS)
def test_every_item_is_computed_by_one_thread(num_threads: int) -> None:
    for name, queries, window in itertools.product(SHAPES, ([1], [1] * 5, [300, 1, 1, 70]), (NO_WINDOW, 100)):
        tiles = tiles_of(SHAPES[name], num_threads, queries, [1500 + 10 * count for count in queries])
        starts, longest, total = share(tiles, SHAPES[name].num_kv_heads, window, num_threads)
        assert len(starts) == num_threads + 1
        assert starts[0] == 0 and starts[-1] == len(tiles) * SHAPES[name].num_kv_heads
        assert all(before <= after for before, after in itertools.pairwise(starts))
        assert longest * num_threads >= total


STEPS = {
    "a prompt": ([512], [512]),
    "the last chunk of a prompt": ([512], [4096]),
    "a long context first": ([1] * 8, [32000] + [128] * 7),
    "a long context last": ([1] * 8, [128] * 7 + [32000]),
    "a prompt beside streams": ([1] * 7 + [300], [2000] * 7 + [300]),
    "one long context": ([1], [32 * 1024]),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("step", STEPS)
def test_no_thread_has_more_than_its_part_and_one_item(name: str, step: str) -> None:
    """What an item costs depends on the keys that it sees; a part of a context is the largest there is."""
    for num_threads in THREADS:
        tiles = tiles_of(SHAPES[name], num_threads, *STEPS[step])
        _, longest, total = share(tiles, SHAPES[name].num_kv_heads, NO_WINDOW, num_threads)
        largest = max(share(tile[None], 1, NO_WINDOW, 1)[2] for tile in tiles)
        assert longest <= total / num_threads + largest
        assert num_threads > 16 or efficiency(SHAPES[name], num_threads, *STEPS[step]) > 0.8


def test_one_long_context_keeps_as_many_threads_busy_as_it_has_parts_of_heads() -> None:
    for num_threads in (1, 2, 4, 8, 16, 32, 64, 128):
        assert efficiency(SHAPES["7B"], num_threads, *STEPS["one long context"]) > 0.95


def test_parts_of_a_context_follow_each_other() -> None:
    tiles = tiles_of(SHAPES["7B"], 64, [1, 1], [3000, 100])
    assert tiles[:, FIRST_PART].tolist() == [0, 1, 2, 0]
    assert tiles[:, LAST_PART].tolist() == [1, 2, 3, 1]
    assert tiles[:, PARTIAL].tolist() == [0, 1, 2, -1]


def test_tiles_stay_whole_where_that_is_balanced() -> None:
    assert tiles_of(SHAPES["0.5B"], 2, [1], [30000])[:, PARTIAL].tolist() == [-1]
    assert tiles_of(SHAPES["0.5B"], 1, [1, 1], [30000, 10])[:, PARTIAL].tolist() == [-1, -1]
    assert MAX_IMBALANCE < 1.2
