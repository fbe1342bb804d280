"""Programs of recorded calls: parameters, memory that is shared, calls that can't be made again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.layers.cpu import CpuOps
from quant.kernels.arrays import call, flat_view, new_fixed, new_output, observed_calls
from quant.kernels.program_cpu import Arena, NotRepeatableError, Program, Recording, Rows

OPS = CpuOps()
MAX_ROWS = 8
WEIGHT = torch.ones(8)


def numbers(size: int, first: float) -> torch.Tensor:
    return torch.arange(first, first + size).reshape(1, size)


def record(parameters: list[torch.Tensor], work: Callable[[], Any], num_rows: Rows = (1, 1)) -> Recording:
    recording = Recording(Arena(), parameters, num_rows, (MAX_ROWS, MAX_ROWS))
    with observed_calls(recording):
        work()
    return recording


def test_a_program_takes_each_parameter_by_its_present_address() -> None:
    x, y = numbers(64, 1.0), numbers(64, 5.0)
    program = Program(record([x, y], lambda: OPS.add(x, y)))
    for first in (3.0, 70.0):
        other_x, other_y = numbers(64, first), numbers(64, -first)
        expected = other_x + other_y
        program.run([other_x, other_y], (1, 1))
        assert torch.equal(other_x, expected)


def normed(table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return OPS.rms_norm(OPS.look_up(table, token_ids, torch.float32), WEIGHT, 1e-6)


def test_a_program_serves_any_number_of_rows() -> None:
    """Parameters change their sizes, and what kernels write grows with the rows."""
    table, token_ids = torch.randn(10, 8), torch.tensor([3, 4])
    results = []
    recording = record([table, token_ids], lambda: results.append(normed(table, token_ids)), (2, 2))
    program, longer = Program(recording, results[0]), torch.randn(30, 8)
    for ids in ([9, 0], [1], list(range(MAX_ROWS)), [4, 4, 7], [9, 0]):
        program.run([longer, torch.tensor(ids)], (len(ids), len(ids)))
        assert program.result is not None
        assert torch.equal(program.result, normed(longer, torch.tensor(ids)))


def test_arrays_have_fewer_rows_once_the_recording_is_told() -> None:
    table, token_ids, needed = torch.randn(10, 8), torch.tensor([3, 4, 5]), torch.tensor([2])
    recording, results = Recording(Arena(), [table, token_ids, needed], (3, 1), (MAX_ROWS, MAX_ROWS)), []

    def work() -> None:
        rows = normed(table, token_ids)
        recording.narrow()
        results.append(OPS.rms_norm(OPS.take_rows(rows, needed), WEIGHT, 1e-6))

    with observed_calls(recording):
        work()
    assert recording.refusal is None
    program = Program(recording, results[0])
    for ids, chosen in (([3, 4, 5], [0]), ([1, 2, 3, 4], [3, 1]), ([5], [0]), (list(range(MAX_ROWS)), [7, 0, 3])):
        program.run([table, torch.tensor(ids), torch.tensor(chosen)], (len(ids), len(chosen)))
        assert program.result is not None
        expected = OPS.rms_norm(normed(table, torch.tensor(ids))[chosen], WEIGHT, 1e-6)
        assert torch.equal(program.result, expected)


def test_arrays_may_have_several_rows_for_each_and_some_never_grow() -> None:
    """Experts: a token has as many pairs as it has experts, and there are as many counts as experts."""
    num_experts, top_k = 3, 2

    def mixed(logits: torch.Tensor) -> torch.Tensor:
        routing = OPS.route(logits, num_experts, top_k, is_normalized=True)
        return OPS.mix(OPS.take_rows(logits, routing.groups.sources), routing)

    logits = torch.randn(1, 8)
    results = []
    recording = record([logits], lambda: results.append(mixed(logits)))
    program = Program(recording, results[0])
    for rows in (5, 1, MAX_ROWS, 2):
        logits = torch.randn(rows, 8)
        program.run([logits], (rows, rows))
        assert program.result is not None
        assert torch.equal(program.result, mixed(logits))


def test_a_token_that_the_table_lacks_becomes_no_number() -> None:
    rows = OPS.look_up(torch.ones(4, 8), torch.tensor([3, 4, -1]), torch.float32)
    assert rows[0].eq(1).all() and rows[1:].isnan().all()


def test_memory_that_nobody_holds_is_taken_again_and_a_result_does_not_hold_it() -> None:
    arena = Arena()
    recording = Recording(arena, [], (2, 2), (MAX_ROWS, MAX_ROWS))
    first = torch.from_numpy(recording.new_array(2, 8))
    address, program = first.data_ptr(), Program(recording, first)
    assert recording.new_array(2, 8).ctypes.data != address
    del first
    gc.collect()
    assert program.result is not None
    assert program.result.data_ptr() == recording.new_array(2, 8).ctypes.data == address


def test_memory_is_held_by_a_view_alone() -> None:
    """Kernels often get the flat view of an output whose tensor nobody keeps."""
    arena = Arena()
    views = [arena.new_array(1, 8, 2).reshape(-1), arena.new_array(2, 8, 2).reshape(-1)]
    addresses = {view.ctypes.data for view in (*views, arena.new_array(1, 8, 2))}
    assert len(addresses) == 3
    del views
    gc.collect()
    arrays = [arena.new_array(1, 8, 2) for _ in range(3)]
    assert {array.ctypes.data for array in arrays} == addresses


def test_stamps_grow_from_call_to_call() -> None:
    x, y = numbers(64, 1.0), numbers(64, 5.0)
    program = Program(record([x, y], lambda: [OPS.add(x, y) for _ in range(3)]))
    stamps = np.zeros(4, np.int64)
    program.run([x, y], (1, 1), stamps)
    assert program.names == ["_add"] * 3
    assert (np.diff(stamps) > 0).all()


def made(num_rows: int) -> torch.Tensor:
    """An array that grows with the rows."""
    return new_output(num_rows, 32)[0].fill_(1)


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: OPS.add(x[:, 8:16], x[:, :8]), "a part of what changes"),
        (lambda x: call(np.negative, flat_view(x), flat_view(x)), "no compiled function"),
        (lambda x: OPS.add(x, made(4)[:2]), "not flat or not all"),
        (lambda x: OPS.add(x, made(4)[2:]), "a part of an array"),
        (lambda x: OPS.add(x, made(3)[1:]), "3 rows in a step of 2"),
    ],
)
def test_calls_that_cannot_be_made_again_are_made_and_refused(work: Callable[[torch.Tensor], Any], reason: str) -> None:
    x = numbers(64, 1.0)
    before = x.clone()
    recording = record([x], lambda: work(x), (2, 2))
    assert recording.refusal is not None and reason in recording.refusal
    assert not torch.equal(x, before)


def test_a_result_is_all_of_an_array_that_a_kernel_has_written() -> None:
    for make in (lambda: numbers(16, 1.0), lambda: made(2)[1:], lambda: made(2).view(4, 16), lambda: new_fixed(16)):
        results: list[torch.Tensor] = []
        recording = record([], lambda: results.append(make()), (2, 2))  # noqa: B023
        with pytest.raises(NotRepeatableError, match="the result"):
            Program(recording, results[0])
