"""The split of a matrix product among threads: everything is computed once, and no thread waits long for another."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from quant.kernels import work_split

THREADS = [*range(1, 65), 96, 128]
RECTANGLE: Any = work_split.rectangle.py_func
EVEN_BLOCK: Any = work_split.even_block.py_func
TILE_RANGE: Any = work_split.tile_range.py_func
FETCHED_PART: Any = work_split.fetched_part.py_func

LARGE_MATRICES = {
    "0.5B": {"gate and up": 9728},
    "7B": {"gate and up": 37888, "down": 3584},
    "72B": {"gate and up": 59136, "down": 8192},
}
"""Outputs of the matrices that have at least a sixth of a model's weights each, the head aside."""
UNITS = {"float32": (12, 4), "integers": (32, 8), "bfloat16": (32, 12)}
"""Outputs of a tile and rows of a unit; the largest there are, those of AVX-512."""


def rectangles(thread: int, num_threads: int, num_tiles: int, num_rows: int, unit_rows: int) -> list[Any]:
    return [
        RECTANGLE(index, thread, num_threads, num_tiles, num_rows, unit_rows)
        for index in range(work_split.NUM_RECTANGLES)
    ]


def efficiency(num_threads: int, num_outputs: int, num_rows: int, unit: tuple[int, int]) -> float:
    """The mean work of the threads over that of the one that has most."""
    tile_outputs, unit_rows = unit
    num_tiles = -(-num_outputs // tile_outputs)
    loads = [
        sum(
            (last - first) * (end - row)
            for first, last, row, end in rectangles(thread, num_threads, num_tiles, num_rows, unit_rows)
        )
        for thread in range(num_threads)
    ]
    return sum(loads) / num_threads / max(loads)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5, 7, 8, 13, 64, 96, 128])
def test_every_output_of_every_row_is_computed_by_one_thread(num_threads: int) -> None:
    for num_tiles, num_rows, unit_rows in itertools.product(
        (1, 2, 3, 28, 112), (0, 1, 7, 31, 32, 65, 100), (1, 4, 8, 12)
    ):
        times = np.zeros((num_tiles, num_rows), int)
        for thread in range(num_threads):
            for first, last, row, end in rectangles(thread, num_threads, num_tiles, num_rows, unit_rows):
                times[first:last, row:end] += 1
                assert row % unit_rows == 0 or row == 0
        assert (times == 1).all()


@pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
def test_many_rows_keep_all_threads_busy(unit: tuple[int, int]) -> None:
    """However few tiles there are: rows are cut, too."""
    for num_threads in THREADS:
        for num_outputs in (896, 1152, *(n for matrices in LARGE_MATRICES.values() for n in matrices.values())):
            assert efficiency(num_threads, num_outputs, 512, unit) > 0.85, (num_threads, num_outputs)


@pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
@pytest.mark.parametrize("num_rows", [1, 8])
def test_few_rows_of_large_matrices_keep_all_threads_of_a_socket_busy(unit: tuple[int, int], num_rows: int) -> None:
    """Tiles are not cut: their number bounds what is reached."""
    for num_threads in THREADS:
        for name, matrices in LARGE_MATRICES.items():
            total = sum(matrices.values())
            time = sum(n / efficiency(num_threads, n, num_rows, unit) for n in matrices.values())
            is_socket = num_threads <= 64
            assert total / time > (0.84 if is_socket else 0.75), (num_threads, name)


def test_no_thread_has_more_than_one_unit_more_than_another() -> None:
    for num_threads, num_tiles, num_rows in itertools.product((2, 7, 64, 96), (28, 36, 112), (1, 8, 64, 510)):
        units = [
            sum(
                (last - first) * -(-(end - row) // 6)
                for first, last, row, end in rectangles(thread, num_threads, num_tiles, num_rows, 6)
            )
            for thread in range(num_threads)
        ]
        per_unit = 1 if num_rows >= work_split.MIN_CUT_ROWS else -(-num_rows // 6)
        assert max(units) - min(units) <= per_unit


class Threads:
    """The threads of a product, each of which computes its next piece when it is told to."""

    def __init__(
        self, num_threads: int, num_tiles: int, num_rows: int, unit_rows: int, row_block: int, each: int
    ) -> None:
        self.claims = work_split.new_claims(num_threads)
        self.sizes = num_threads, num_tiles, num_rows, unit_rows, row_block, each
        self.turns = [0] * num_threads
        self.times = np.zeros((num_tiles, num_rows), int)
        self.work = [0] * num_threads

    def step(self, thread: int) -> bool:
        """Whether the thread had something left to look for."""
        if self.turns[thread] < 0:
            return False
        self.turns[thread], first, last, row, end = work_split.next_piece(
            self.claims, thread, self.turns[thread], *self.sizes
        )
        if first < last and row < end:
            assert last <= self.times.shape[0]
            assert end <= self.times.shape[1]
        self.times[first:last, row:end] += 1
        self.work[thread] += max(last - first, 0) * max(end - row, 0)
        return True


@settings(max_examples=200)
@given(
    num_threads=st.integers(1, 9),
    num_tiles=st.integers(1, 40),
    num_rows=st.integers(0, 100),
    unit_rows=st.sampled_from([1, 4, 8, 12]),
    blocks=st.integers(1, 5),
    each=st.integers(1, 6),
    data=st.data(),
)
def test_every_output_is_computed_once_however_quick_the_threads_are(
    num_threads: int, num_tiles: int, num_rows: int, unit_rows: int, blocks: int, each: int, data: st.DataObject
) -> None:
    threads = Threads(num_threads, num_tiles, num_rows, unit_rows, blocks * unit_rows, each)
    for thread in data.draw(st.lists(st.integers(0, num_threads - 1), max_size=200)):
        threads.step(thread)
    for thread in range(num_threads):
        while threads.step(thread):
            pass
    assert (threads.times == 1).all()


@pytest.mark.parametrize("num_rows", [1, 8, 512])
@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_a_thread_that_is_held_up_keeps_what_it_has_begun(num_threads: int, num_rows: int) -> None:
    threads = Threads(num_threads, 320, num_rows, 8, 256, 4)
    for _ in range(3 + num_threads):
        threads.step(0)
    before = threads.work[0]
    for thread in range(1, num_threads):
        while threads.step(thread):
            pass
    assert (threads.times == 1).all(), "the others compute the rest"
    assert threads.work[0] == before < 320 * num_rows // num_threads
    while threads.step(0):
        pass
    assert threads.work[0] == before


@pytest.mark.parametrize(
    ("k_size", "num_rows", "tiles"),
    [(896, 1, 18), (896, 8, 18), (896, 31, 4), (896, 512, 1), (4864, 1, 3), (4864, 64, 1), (18944, 512, 1)],
)
def test_a_piece_is_worth_a_claim(k_size: int, num_rows: int, tiles: int) -> None:
    """No more than four million products, or one tile."""
    assert work_split.tiles_of_piece(32 * k_size, num_rows, 264) == tiles


@njit(nogil=True)
def _claim_all(claims: Any, owner: int, num_pieces: int, claimed: Any) -> int:
    count = 0
    number = work_split.claim(claims, owner, num_pieces)
    while number < num_pieces:
        claimed[count] = number
        count += 1
        number = work_split.claim(claims, owner, num_pieces)
    return count


def test_no_piece_is_claimed_twice_by_threads_that_come_at_once() -> None:
    num_pieces, num_threads, num_owners = 500_000, 4, 8
    claims, claimed = work_split.new_claims(num_owners), np.empty((num_owners, num_threads, num_pieces), np.int64)
    _claim_all(work_split.new_claims(1), 0, 1, claimed[0, 0])  # compiles
    together = Barrier(num_threads)

    def claim(thread: int) -> dict[int, Any]:
        found = {}
        for owner in range(num_owners):
            together.wait(60)
            found[owner] = claimed[owner, thread, : _claim_all(claims, owner, num_pieces, claimed[owner, thread])]
        return found

    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(claim, range(num_threads)))
    for owner in range(num_owners):
        numbers = np.sort(np.concatenate([of_thread[owner] for of_thread in found]))
        assert np.array_equal(numbers, np.arange(num_pieces))


@pytest.mark.parametrize(
    ("num_rows", "max_rows", "size"), [(512, 288, 258), (512, 72, 64), (288, 288, 288), (1, 48, 6), (0, 48, 6)]
)
def test_rows_that_do_not_fit_the_cache_make_blocks_that_are_alike(num_rows: int, max_rows: int, size: int) -> None:
    assert EVEN_BLOCK(num_rows, max_rows, 4 if max_rows == 72 else 6) == size


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("num_tiles", [1, 5, 88, 128])
def test_threads_have_equal_parts_of_every_matrix_of_a_grouped_product(num_threads: int, num_tiles: int) -> None:
    loads = np.zeros(num_threads, int)
    for index in range(2 * num_threads):
        ranges = [TILE_RANGE(index, thread, num_threads, num_tiles) for thread in range(num_threads)]
        assert sorted(tile for first, last in ranges for tile in range(first, last)) == [*range(num_tiles)]
        sizes = [last - first for first, last in ranges]
        assert max(sizes) - min(sizes) <= 1, "however many rows this matrix has"
        loads += sizes
    assert (loads == 2 * num_tiles).all(), "threads take turns at the larger ranges"


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 43])
def test_the_blocks_of_a_tile_ask_for_the_whole_next_one(num_blocks: int) -> None:
    asked = [FETCHED_PART(block, num_blocks) for block in range(num_blocks)]
    (num_parts,) = {parts for _, parts in asked}
    assert [part for part, _ in asked[:num_parts]] == list(range(num_parts)), "each part once, in the first blocks"
    assert num_parts > num_blocks / 2 or num_parts == 4
