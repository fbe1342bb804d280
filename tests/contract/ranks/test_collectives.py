"""Sums and gathers of ranks that are processes: the same numbers from every kind, bit by bit, for any sizes."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from parallel import shared_memory
from parallel.shared_memory import SharedMemoryCollectives, memory_bytes
from parallel.state import Collectives, ParallelState, RankLostError
from parallel.torch_collectives import FEW_NUMBERS
from tests.contract.ranks.processes import KINDS, SLOT_FLOATS, Processes
from tests.diagonal import long_but

Array = npt.NDArray[np.float32]

WIDTHS = (5, 3, 7)
"""Widths of the parts of ranks 0, 1 and 2."""


@pytest.fixture(scope="module", params=long_but([2, 3], 3))
def ranks(request: pytest.FixtureRequest) -> Iterator[Processes]:
    with Processes(request.param) as processes:
        yield processes


def part(rank: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """What a rank contributes: numbers of all magnitudes, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(*shape, generator=generator) * 10 ** (4 * torch.rand(*shape, generator=generator))


def sum_in_order(size: int, *shape: int, seed: int = 0) -> torch.Tensor:
    total = part(0, *shape, seed=seed)
    for rank in range(1, size):
        total += part(rank, *shape, seed=seed)
    return total


def do_sum(collectives: Collectives, rank: int, size: int, shape: tuple[int, ...]) -> Array:
    x = part(rank, *shape)
    summed = collectives.all_reduce(x)
    assert summed.data_ptr() == x.data_ptr(), "in x's memory"
    return summed.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_in_the_order_of_the_ranks(kind: str, ranks: Processes) -> None:
    numbers = (1, 7, SLOT_FLOATS - 1, SLOT_FLOATS, SLOT_FLOATS + 1, 5 * SLOT_FLOATS + 3)
    shapes: list[tuple[int, ...]] = [*((number,) for number in numbers), (3, 50), (2, 500)]
    if kind == "gloo":
        shapes.append((2, 1 + FEW_NUMBERS // 2))  # summed in parts
    for shape in shapes:
        expected = sum_in_order(ranks.size, *shape).numpy()
        for summed in ranks.run(kind, do_sum, shape):
            np.testing.assert_array_equal(summed, expected)


def test_threads_copy_and_add_as_one_does() -> None:
    """Several pieces, the last of them not whole, from the middle of an array."""
    count, stride = 2 * shared_memory.PIECE + 5, 3 * shared_memory.PIECE
    x = part(0, count + 7).numpy()
    slots, out = np.zeros(3 * stride, np.float32), np.zeros(count + 7, np.float32)
    for rank in range(3):
        shared_memory._copy_parallel(x * (rank + 1), 7, count, slots, rank * stride)
    shared_memory._sum_parallel(slots, 0, stride, 3, out, 7, count)
    np.testing.assert_array_equal(out[7:], (x + x * 2 + x * 3)[7:])
    assert not out[:7].any()


def do_sum_rows(collectives: Collectives, rank: int, size: int, num_rows: int) -> int:
    """The number of rows whose bits differ from those of the same row alone."""
    x = part(rank, num_rows, 300)
    alone = torch.cat([collectives.all_reduce(row[None].clone()) for row in x])
    together = collectives.all_reduce(x.clone())
    return int((together != alone).any(dim=1).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(kind: str, ranks: Processes) -> None:
    many = 1 + FEW_NUMBERS // 300 // ranks.size  # summed in parts by gloo
    for num_rows in (2, 3, 17, *([many] if kind == "gloo" else [])):
        assert ranks.run(kind, do_sum_rows, num_rows) == [0] * ranks.size


def do_gather(
    collectives: Collectives, rank: int, size: int, num_rows: int, widths: tuple[int, ...], is_for_all: bool
) -> Array | None:
    x = part(rank, num_rows, widths[rank] + 1)[:, : widths[rank]]  # not contiguous
    gathered = (collectives.all_gather if is_for_all else collectives.gather)(x, widths)
    return None if gathered is None else gathered.numpy()


@pytest.mark.parametrize("is_for_all", [True, False], ids=["all_gather", "gather"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_different_widths_lie_side_by_side(kind: str, is_for_all: bool, ranks: Processes) -> None:
    size = ranks.size
    for num_rows, widths in (
        (1, WIDTHS[:size]),
        (4, WIDTHS[:size]),
        (9, WIDTHS[:size]),  # a slot's worth of the widest
        (10, WIDTHS[:size]),
        (50, WIDTHS[:size]),
        (3, (SLOT_FLOATS, 1, 1)[:size]),
        (3, (1,) * (size - 1) + (SLOT_FLOATS,)),
        (0, WIDTHS[:size]),
    ):
        wider = [part(rank, num_rows, widths[rank] + 1)[:, : widths[rank]] for rank in range(size)]
        expected = torch.cat(wider, dim=1).numpy()
        first, *others = ranks.run(kind, do_gather, num_rows, widths, is_for_all)
        np.testing.assert_array_equal(first, expected)
        for other in others:
            if is_for_all:
                np.testing.assert_array_equal(other, expected)
            else:
                assert other is None


def do_maximum(collectives: Collectives, rank: int, size: int) -> Array:
    return ParallelState(rank, size, collectives).maximum(part(rank, 2, 3, 1)).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_over_the_ranks(kind: str, ranks: Processes) -> None:
    expected = torch.stack([part(rank, 2, 3, 1) for rank in range(ranks.size)]).amax(dim=0).numpy()
    for largest in ranks.run(kind, do_maximum):
        np.testing.assert_array_equal(largest, expected)


NUM_OPERATIONS = dict(zip(KINDS, (1000, 5000, 300), strict=True))


def do_many(collectives: Collectives, rank: int, size: int, count: int) -> list[int]:
    """Operations of any kind and size in a row; the numbers of those with a wrong result."""
    choices = random.Random(0)  # the same on every rank
    delays = random.Random(rank)
    pool = [torch.randn(512, generator=torch.Generator().manual_seed(other)) for other in range(size)]
    wrong = []
    for index in range(count):
        kind, num_rows = choices.choice(("all_reduce", "all_gather", "gather")), choices.randint(1, 9)
        widths = [choices.randint(1, 40) for _ in range(size)]
        if kind == "all_reduce":
            widths = widths[:1] * size
        first = choices.randrange(512 - 9 * 40)
        parts = [
            (numbers[first : first + num_rows * width] + index).view(num_rows, width)
            for numbers, width in zip(pool, widths, strict=True)
        ]
        if delays.random() < 0.02:
            time.sleep(delays.random() * 2e-3)  # somebody else was given the core
        if kind == "all_reduce":
            result: torch.Tensor | None = collectives.all_reduce(parts[rank].clone())
            expected = parts[0].clone()
            for other in parts[1:]:
                expected += other
        else:
            result = getattr(collectives, kind)(parts[rank], widths)
            expected = torch.cat(parts, dim=1)
        if (result is None) != (kind == "gather" and rank > 0):
            wrong.append(index)
        elif result is not None and not torch.equal(result, expected):
            wrong.append(index)
    return wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", long_but({"a fifth": 0.2, "all": 1.0}, "a fifth"))
def test_many_operations_in_a_row_stay_in_step(kind: str, share: float, ranks: Processes) -> None:
    assert ranks.run(kind, do_many, int(share * NUM_OPERATIONS[kind])) == [[]] * ranks.size


@pytest.mark.parametrize("size", long_but([2, 3], 2))
def test_host_tensors_go_through_a_group_made_for_gpus(size: int) -> None:
    """Weights that load are on the host, and their scales need all ranks. Here gloo stands in for NCCL, too."""
    with Processes(size, "cpu:gloo,cuda:gloo") as processes:
        for summed in processes.run("gloo", do_sum, (2, 500)):
            np.testing.assert_array_equal(summed, sum_in_order(size, 2, 500).numpy())
        for largest in processes.run("gloo", do_maximum):
            expected = torch.stack([part(rank, 2, 3, 1) for rank in range(size)]).amax(dim=0)
            np.testing.assert_array_equal(largest, expected.numpy())
        message, seconds = processes.run("gloo", do_wait_in_vain)[0]
        assert message.startswith("gloo lost another rank, or waited 0.5 s: ")
        assert 0.4 < seconds < 5


def do_wait_in_vain(collectives: Collectives, rank: int, size: int) -> tuple[str, float]:
    """The error that rank 0 gets when it is alone, and after how long."""
    collectives.timeout_s = 0.5
    started = time.monotonic()
    if rank:
        time.sleep(1.5)
        return "", 0.0
    with pytest.raises(RankLostError) as error:
        collectives.all_reduce(torch.zeros(3))
    return str(error.value), time.monotonic() - started


def test_gloo_does_not_wait_longer_than_it_may() -> None:
    with Processes(2) as processes:
        message, seconds = processes.run("gloo", do_wait_in_vain)[0]
    assert message.startswith("gloo lost another rank, or waited 0.5 s: ")
    assert 0.4 < seconds < 5


@pytest.fixture(params=[False, True], ids=["", "crowded"])
def in_one_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[SharedMemoryCollectives]:
    """Collectives of three ranks."""
    monkeypatch.setattr(shared_memory, "SLOT_FLOATS", SLOT_FLOATS)
    fd = os.memfd_create("test")
    os.ftruncate(fd, memory_bytes(3))
    made = [SharedMemoryCollectives(fd, rank, 3, 0.2, is_crowded=request.param) for rank in range(3)]
    os.close(fd)
    return made


def sum_as(collectives: SharedMemoryCollectives) -> threading.Thread:
    thread = threading.Thread(target=collectives.all_reduce, args=(torch.ones(4),))
    thread.start()
    return thread


@pytest.mark.parametrize(
    "operation",
    [
        lambda collectives: collectives.all_reduce(torch.zeros(4)),
        lambda collectives: collectives.all_gather(torch.zeros(2, 1), [1, 1, 1]),
        lambda collectives: collectives.gather(torch.zeros(2, 1), [1, 1, 1]),
    ],
    ids=["all_reduce", "all_gather", "gather"],
)
def test_a_rank_that_does_not_come_is_named(
    operation: Callable[[Collectives], object], in_one_process: list[SharedMemoryCollectives]
) -> None:
    first, second, third = in_one_process
    second.timeout_s = third.timeout_s = 60.0
    threads = [sum_as(second), sum_as(third)]
    assert first.all_reduce(torch.full((4,), 2.0)).tolist() == [4.0] * 4
    for thread in threads:
        thread.join()
    started = time.monotonic()
    with pytest.raises(RankLostError, match="^rank 1 hangs: the others have waited 0.2 s for it$"):
        operation(first)
    assert 0.2 <= time.monotonic() - started < 2


def test_the_rank_that_is_late_is_named_and_not_one_that_came(in_one_process: list[SharedMemoryCollectives]) -> None:
    first, second, _ = in_one_process
    second.gather(torch.zeros(1, 1), [1, 1, 1])  # contributes, and need not wait
    with pytest.raises(RankLostError, match="^rank 2 hangs: "):
        first.gather(torch.zeros(1, 1), [1, 1, 1])


def test_a_late_rank_is_waited_for(in_one_process: list[SharedMemoryCollectives]) -> None:
    first, second, third = in_one_process
    first.timeout_s = second.timeout_s = third.timeout_s = 60.0
    threads = [sum_as(first), sum_as(second)]
    time.sleep(0.05)
    assert third.all_reduce(torch.ones(4)).tolist() == [3.0] * 4
    for thread in threads:
        thread.join()


def test_who_gives_up_wakes_at_once_and_says_the_first_cause(in_one_process: list[SharedMemoryCollectives]) -> None:
    first = in_one_process[0]
    first.timeout_s = 60.0
    started = time.monotonic()
    timers = [
        threading.Timer(0.1, first.give_up, ["rank 1 on 10.0.0.2 is gone"]),
        threading.Timer(0.3, first.give_up, ["something else"]),
    ]
    for timer in timers:
        timer.start()
    with pytest.raises(RankLostError, match="^rank 1 on 10.0.0.2 is gone$"):
        first.all_reduce(torch.zeros(4))
    assert time.monotonic() - started < 2
    for timer in timers:
        timer.join()
    with pytest.raises(RankLostError, match="^rank 1 on 10.0.0.2 is gone$"):
        first.all_reduce(torch.zeros(4))


def test_a_row_that_is_longer_than_a_slot(in_one_process: list[SharedMemoryCollectives]) -> None:
    with pytest.raises(AssertionError, match="a row is longer than a slot"):
        in_one_process[0].all_gather(torch.zeros(1, 1), [1, SLOT_FLOATS + 1, 1])
