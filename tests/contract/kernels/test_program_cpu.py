"""Programs of recorded calls: parameters, memory that is shared, calls that can't be made again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.layers.cpu import CpuOps
from quant.kernels.arrays import call, flat_view, observed_calls
from quant.kernels.program_cpu import Arena, Program, Recording

OPS = CpuOps()


def numbers(size: int, first: float) -> torch.Tensor:
    return torch.arange(first, first + size).reshape(1, size)


def record(parameters: list[torch.Tensor], work: Callable[[], Any]) -> Recording:
    recording = Recording(Arena(2), parameters)
    with observed_calls(recording):
        work()
    return recording


def test_a_program_takes_each_parameter_by_its_present_address() -> None:
    x, y = numbers(64, 1.0), numbers(64, 5.0)
    program = Program(record([x, y], lambda: OPS.add(x, y)))
    for first in (3.0, 70.0):
        other_x, other_y = numbers(64, first), numbers(64, -first)
        expected = other_x + other_y
        program.run([other_x, other_y])
        assert torch.equal(other_x, expected)


def test_a_parameter_may_change_its_sizes() -> None:
    table, weight = torch.randn(10, 8), torch.ones(8)
    token_ids = torch.tensor([3, 4])
    results = []
    recording = Recording(Arena(4), [table, token_ids])
    with observed_calls(recording):
        results.append(OPS.rms_norm(OPS.look_up(table, token_ids, torch.float32), weight, 1e-6))
    program, longer = Program(recording), torch.randn(30, 8)
    program.run([longer, torch.tensor([9, 0])])
    assert torch.equal(results[0], OPS.rms_norm(longer[[9, 0]], weight, 1e-6))


def test_a_token_that_the_table_lacks_becomes_no_number() -> None:
    rows = OPS.look_up(torch.ones(4, 8), torch.tensor([3, 4, -1]), torch.float32)
    assert rows[0].eq(1).all() and rows[1:].isnan().all()


def test_memory_that_nobody_holds_is_taken_again_and_an_alias_does_not_hold_it() -> None:
    arena = Arena(2)
    first = torch.from_numpy(arena.new_array(1, 8))
    address, alias = first.data_ptr(), arena.alias(first)
    assert arena.new_array(2, 8).ctypes.data != address
    del first
    gc.collect()
    assert alias.data_ptr() == arena.new_array(2, 8).ctypes.data == address


def test_memory_is_held_by_a_view_alone() -> None:
    """Kernels often get the flat view of an output whose tensor nobody keeps."""
    arena = Arena(2)
    views = [arena.new_array(1, 8).reshape(-1), arena.new_array(2, 8).reshape(-1)]
    addresses = {view.ctypes.data for view in (*views, arena.new_array(1, 8))}
    assert len(addresses) == 3
    del views
    gc.collect()
    arrays = [arena.new_array(1, 8) for _ in range(3)]
    assert {array.ctypes.data for array in arrays} == addresses


def test_stamps_grow_from_call_to_call() -> None:
    x, y = numbers(64, 1.0), numbers(64, 5.0)
    program = Program(record([x, y], lambda: [OPS.add(x, y) for _ in range(3)]))
    stamps = np.zeros(4, np.int64)
    program.run([x, y], stamps)
    assert program.names == ["_add"] * 3
    assert (np.diff(stamps) > 0).all()


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: OPS.add(x[:, 8:16], x[:, :8]), "a part of what changes"),
        (lambda x: call(np.negative, flat_view(x), flat_view(x)), "no compiled function"),
    ],
)
def test_calls_that_cannot_be_made_again_are_made_and_refused(work: Callable[[torch.Tensor], Any], reason: str) -> None:
    x = numbers(64, 1.0)
    before = x.clone()
    recording = record([x], lambda: work(x))
    assert recording.refusal is not None and reason in recording.refusal
    assert not torch.equal(x, before)
