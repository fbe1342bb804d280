"""Small sums through symmetric memory are used only where they are NCCL's, on every rank. Threads stand in for GPUs."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric_memory

from parallel.state import Collectives, ParallelState
from parallel.symmetric_memory import MAX_BYTES, Connect, SmallSums, Sum, allocate_one_shot_sum, with_small_sums
from tests.unit.parallel.threads import run_ranks

CPU = torch.device("cpu")


def sum_of(parallel: ParallelState, calls: list[int], wrong_from: int = 1 << 30) -> Sum:
    """A one-shot sum that notes its sizes, and is wrong for `wrong_from` numbers and more."""

    def add(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.numel())
        summed = parallel.all_reduce(x.clone())
        return summed + 1 if x.numel() >= wrong_from else summed

    return add


def collectives_of(parallel: ParallelState) -> Collectives:
    assert parallel.collectives is not None
    return parallel.collectives


def test_right_sums_are_used_up_to_their_size() -> None:
    def work(parallel: ParallelState) -> tuple[list[float], list[int]]:
        calls: list[int] = []
        made = with_small_sums(collectives_of(parallel), parallel.rank, CPU, lambda: lambda: sum_of(parallel, calls))
        assert isinstance(made, SmallSums)
        calls.clear()
        small = made.all_reduce(torch.full((2, 3), 1.0 + parallel.rank))
        large = made.all_reduce(torch.ones(MAX_BYTES // 4 + 1))
        assert made.all_gather(torch.ones(1, 1), [1, 1]).tolist() == [[1.0, 1.0]]
        return [float(small.mean()), float(large.mean())], calls

    assert run_ranks(2, work) == [([3.0, 2.0], [6])] * 2


@pytest.mark.parametrize("wrong_from", [1, 896, 8192])
def test_wrong_sums_of_one_rank_are_used_by_nobody(wrong_from: int, caplog: pytest.LogCaptureFixture) -> None:
    def work(parallel: ParallelState) -> bool:
        make = sum_of(parallel, [], wrong_from if parallel.rank else 1 << 30)
        plain = collectives_of(parallel)
        return with_small_sums(plain, parallel.rank, CPU, lambda: lambda: make) is plain

    with caplog.at_level(logging.WARNING):
        assert run_ranks(2, work) == [True, True]
    assert any(f"sums of {max(wrong_from, 8)} torch.bfloat16 differ" in text for text in caplog.messages)


def test_sums_of_a_few_numbers_are_checked_and_those_of_odd_bytes_stay_plain() -> None:
    """torch's kernel takes multiples of 4 bytes, and raises RuntimeError for others."""

    def work(parallel: ParallelState) -> tuple[list[tuple[int, torch.dtype]], list[float]]:
        calls: list[tuple[int, torch.dtype]] = []

        def add(x: torch.Tensor) -> torch.Tensor:
            if x.nbytes % 4:
                raise RuntimeError("size must be 4-byte aligned")
            calls.append((x.numel(), x.dtype))
            return parallel.all_reduce(x.clone())

        made = with_small_sums(collectives_of(parallel), parallel.rank, CPU, lambda: lambda: add)
        assert [size for size, dtype in calls if dtype == torch.float32][:3] == [1, 3, 8]
        calls.clear()
        numbers = [torch.ones(size, dtype=dtype) for dtype in (torch.bfloat16, torch.float32) for size in (1, 2, 3)]
        return calls, [float(made.all_reduce(x).sum()) for x in numbers]

    calls, sums = run_ranks(2, work)[0]
    assert calls == [(2, torch.bfloat16), *((size, torch.float32) for size in (1, 2, 3))]
    assert sums == [2.0, 4.0, 6.0] * 2


@pytest.mark.parametrize("failing", ["allocate", "connect"])
def test_a_rank_without_small_sums_is_not_waited_for(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    """Threads that wait for each other would time out. Without memory on all ranks, none goes to meet the others."""

    def work(parallel: ParallelState) -> tuple[bool, list[str]]:
        begun: list[str] = []

        def begin(act: str) -> None:
            begun.append(act)
            if parallel.rank and act == failing:
                raise RuntimeError("no peer access")

        def connect() -> Sum:
            begin("connect")
            return sum_of(parallel, [])

        def allocate() -> Connect:
            begin("allocate")
            return connect

        plain = collectives_of(parallel)
        return with_small_sums(plain, parallel.rank, CPU, allocate) is plain, begun

    begun = ["allocate"] if failing == "allocate" else ["allocate", "connect"]
    with caplog.at_level(logging.WARNING):
        assert run_ranks(2, work) == [(True, begun)] * 2
    reasons = {text.partition(": ")[2] for text in caplog.messages}
    assert reasons == {"no peer access", "another rank has none, or gets other sums"}


def test_memory_is_there_before_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    acts: list[str] = []

    def empty(num_bytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        acts.append("empty")
        return torch.empty(num_bytes, dtype=dtype, device=device)

    monkeypatch.setattr(symmetric_memory, "empty", empty)
    monkeypatch.setattr(symmetric_memory, "rendezvous", lambda buffer, group_name: acts.append(group_name))
    connect = allocate_one_shot_sum("group", CPU)
    assert acts == ["empty"]
    connect()
    assert acts == ["empty", "group"]


def test_a_dtype_that_has_no_small_sums_keeps_the_plain_ones() -> None:
    """torch's kernel takes no float16, and says so on every rank; NCCL does."""

    def work(parallel: ParallelState) -> tuple[list[int], list[float]]:
        calls: list[int] = []
        add = sum_of(parallel, calls)

        def add_some(x: torch.Tensor) -> torch.Tensor:
            if x.dtype == torch.float16:
                raise RuntimeError("not implemented for 'Half'")
            return add(x)

        made = with_small_sums(collectives_of(parallel), parallel.rank, CPU, lambda: lambda: add_some)
        calls.clear()
        sums = [made.all_reduce(torch.ones(2, dtype=dtype)) for dtype in (torch.float16, torch.bfloat16, torch.int32)]
        return calls, [float(summed.sum()) for summed in sums]

    assert run_ranks(2, work) == [([2], [4.0, 4.0, 4.0])] * 2


def test_gpus_that_cannot_reach_each_other_keep_the_plain_sums(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Connect:
        raise RuntimeError("no peer access\nlong explanation")

    def work(parallel: ParallelState) -> bool:
        plain = collectives_of(parallel)
        return with_small_sums(plain, parallel.rank, CPU, fail) is plain

    with caplog.at_level(logging.WARNING):
        assert run_ranks(2, work) == [True, True]
    assert caplog.messages == ["Small sums don't go through symmetric memory: no peer access"] * 2
