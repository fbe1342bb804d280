"""Which backend gets a tensor, and what a graph would capture. Torch's own calls are only written down here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from engine import device
from parallel import torch_collectives
from parallel.state import RankLostError
from parallel.torch_collectives import TorchCollectives

Calls = list[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of torch.distributed, which do nothing."""
    made: Calls = []

    def note(name: str) -> Any:
        return lambda *args, **kwargs: made.append(name)

    for name in "init_process_group all_reduce all_to_all_single gather".split():
        monkeypatch.setattr(dist, name, note(name))
    monkeypatch.setattr(torch_collectives, "_all_gather", note("all_gather"))
    return made


def make(calls: Calls, backend: str = "cpu:gloo,meta:nccl", size: int = 3) -> TorchCollectives:
    store: Any = None
    collectives = TorchCollectives(backend, store, 0, size, 1.0)
    calls.clear()
    return collectives


def test_a_gpus_row_names_a_backend_for_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    gpu = device.detect_device(0)
    assert BackendConfig(gpu.collectives).get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}  # type: ignore[arg-type]


def test_the_name_is_that_of_the_device(calls: Calls) -> None:
    assert make(calls).name == "nccl"
    assert make(calls, "gloo").name == "gloo"


@pytest.mark.parametrize(
    ("size", "where", "expected"),
    [
        (3, "meta", ["all_reduce"]),
        (3, "cpu", ["all_gather"]),  # gloo's own sum would depend on the place in the buffer
        (2, "cpu", ["all_reduce"]),
    ],
)
def test_sums_by_the_device_of_the_tensor(size: int, where: str, expected: Calls, calls: Calls) -> None:
    collectives = make(calls, size=size)
    collectives.all_reduce(torch.empty(4, 5, device=where))
    assert calls == expected


def test_nothing_of_a_gpus_collectives_is_read(calls: Calls) -> None:
    """Tensors on the device `meta` have no numbers, so that a read would be an error: a graph can capture all of it."""
    collectives = make(calls)
    x = torch.empty(4, 5, device="meta", dtype=torch.bfloat16)
    assert collectives.all_reduce(x) is x
    assert collectives.all_gather(x, [5, 3, 7]).shape == (4, 15)
    gathered = collectives.gather(x, [5, 3, 7])
    assert gathered is not None and gathered.shape == (4, 15)
    assert calls == ["all_reduce", "all_gather", "gather"]


def test_memory_that_is_full_is_no_lost_rank(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    collectives = make(calls)

    def fail(error: RuntimeError) -> Any:
        def call(*args: Any) -> None:
            raise error

        return call

    monkeypatch.setattr(dist, "all_reduce", fail(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        collectives.all_reduce(torch.empty(1, device="meta"))
    monkeypatch.setattr(dist, "all_reduce", fail(RuntimeError("peer closed\nmore")))
    with pytest.raises(RankLostError, match="^nccl lost another rank, or waited 1 s: peer closed$"):
        collectives.all_reduce(torch.empty(1, device="meta"))
