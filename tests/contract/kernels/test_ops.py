"""All ops against plain torch; rows on their own and beside others."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from engine.layers import OPS
from engine.layers.base import Rotation
from engine.layers.cpu import PARALLEL_ELEMENTS, CpuOps
from engine.layers.rope import Rotary, make_rotary
from engine.layers.torch import TorchOps
from engine.link.registry import import_entry
from engine.programs import _Operations
from tests.contract.oracles import backends_here

ALL = [import_entry(OPS, name, "ops")() for name in backends_here(OPS)]
CPU, TORCH = CpuOps(), TorchOps()
EPS = 1e-6
MANY = PARALLEL_ELEMENTS // 64 + 1
"""Rows of 64 elements that are worth a parallel region."""
ROWS = [1, 2, 7, MANY]


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [8, 64, 200])
def test_rms_norm(rows: int, size: int) -> None:
    x, weight = random(rows, size), random(size, seed=1)
    before = x.clone()
    expected = functional.rms_norm(x, (size,), weight, EPS)
    for ops in ALL:
        torch.testing.assert_close(ops.rms_norm(x, weight, EPS), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(x, before)


def test_rms_norm_of_almost_nothing_is_ruled_by_eps() -> None:
    x, weight = torch.full((1, 8), 1e-4), torch.ones(8)
    expected = 1e-4 / (1e-8 + 1e-2) ** 0.5
    for ops in ALL:
        torch.testing.assert_close(ops.rms_norm(x, weight, 1e-2), torch.full((1, 8), expected))


@pytest.mark.parametrize("rows", ROWS)
def test_add_rms_norm(rows: int) -> None:
    residual, x, weight = random(rows, 64), random(rows, 64, seed=1), random(64, seed=2)
    total, before = residual + x, x.clone()
    expected = functional.rms_norm(total, (64,), weight, EPS)
    for ops in ALL:
        updated = residual.clone()
        torch.testing.assert_close(ops.add_rms_norm(updated, x, weight, EPS), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(updated, total)
        assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [1, 32, MANY])
def test_rows_of_a_step_need_nothing_of_torch(rows: int) -> None:
    """A step that is a program has no operation of torch between its kernels, few rows or many."""
    table, x = random(40, 4096), random(rows, 4096, seed=1)
    ids, operations = torch.arange(rows) % 40, _Operations()
    needed = torch.tensor([rows - 1, 0, rows // 2])
    expected = (table[ids] + x)[needed]
    with operations:
        residual = CPU.look_up(table, ids, torch.float32)
        CPU.add(residual, x)
        taken = CPU.take_rows(residual, needed)
    assert torch.equal(taken, expected)
    assert operations.refusal is None


@pytest.mark.parametrize("size", [8, 12, 64])
def test_take_rows(size: int) -> None:
    """Some rows, all of them, none; 12 numbers are none of the CPU kernel's."""
    x = random(MANY, size)
    for rows in (torch.tensor([5, 0, 5]), torch.arange(MANY), torch.empty(0, dtype=torch.int64)):
        for ops in ALL:
            assert torch.equal(ops.take_rows(x, rows), x[rows])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [8, 12, 16])
def test_norm_heads(rows: int, size: int) -> None:
    """Three of five heads, each with a weight of its own; 12 features are none of the CPU kernel's."""
    qkv, weight = random(rows, 5 * size), random(3, size, seed=1)
    heads = qkv.view(rows, 5, size)[:, :3]
    expected = torch.stack([functional.rms_norm(heads[:, i], (size,), weight[i], EPS) for i in range(3)], dim=1)
    for ops in ALL:
        normed = qkv.clone()
        ops.norm_heads(normed, weight, EPS)
        torch.testing.assert_close(normed.view(rows, 5, size)[:, :3], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(normed[:, 3 * size :], qkv[:, 3 * size :]), "the other heads are not normed"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [8, 96])
def test_silu_and_mul(rows: int, size: int) -> None:
    gate_up = random(rows, 2 * size)
    gate_up[0, :4] = torch.tensor([-200.0, -90.0, 0.0, 200.0])
    expected = functional.silu(gate_up[:, :size]) * gate_up[:, size:]
    for ops in ALL:
        torch.testing.assert_close(ops.silu_and_mul(gate_up), expected, atol=1e-6, rtol=1e-5)


def test_silu_keeps_nan_in_its_place() -> None:
    gate_up = random(2, 16)
    gate_up[1, 3] = torch.nan
    out = CPU.silu_and_mul(gate_up)
    assert out.isnan().nonzero().tolist() == [[1, 3]]


def make_rotary_of(head_dim: int, num_positions: int = 100) -> Rotary:
    rotary = make_rotary({"max_position_embeddings": num_positions}, head_dim, torch.device("cpu"))
    rotary.allocate(num_positions)
    return rotary


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_rotate(rows: int, head_dim: int) -> None:
    rotation = Rotation(make_rotary_of(head_dim).table, torch.arange(rows).flip(0) % 100)
    qkv = random(rows, 5 * head_dim)
    expected = qkv.clone()
    TORCH.rotate(expected, rotation, 4)
    for ops in ALL:
        rotated = qkv.clone()
        ops.rotate(rotated, rotation, 4)
        torch.testing.assert_close(rotated, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(rotated[:, 4 * head_dim :], qkv[:, 4 * head_dim :]), "the values are not rotated"
        lengths = [qkv.view(rows, 5, head_dim).norm(dim=2) for qkv in (qkv, rotated)]
        torch.testing.assert_close(*lengths)


def test_rotation_tells_only_the_distance() -> None:
    rotary = make_rotary_of(16)
    query, key = random(1, 16), random(1, 16, seed=1)
    products = []
    for start in (0, 40):
        pair = torch.cat([query, key])
        positions = torch.tensor([start + 7, start])
        CPU.rotate(pair, rotary.prepare(positions, [0, 1, 2], [start + 8, start + 1], [100, 100]), 1)
        products.append(pair[0] @ pair[1])
    torch.testing.assert_close(products[0], products[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "norm_heads", "silu_and_mul", "rotate"])
def test_a_row_does_not_depend_on_the_others(operation: str) -> None:
    """Rows have the same bits on both sides of the border between one thread and many."""
    x, weight = random(MANY, 64), random(64, seed=1)
    table = make_rotary_of(16, MANY).table

    def run(rows: slice) -> torch.Tensor:
        part = x[rows].clone()
        if operation == "rms_norm":
            return CPU.rms_norm(part, weight, EPS)
        if operation == "add_rms_norm":
            return CPU.add_rms_norm(part, x[rows] * 0.5, weight, EPS)
        if operation == "norm_heads":
            CPU.norm_heads(part, weight[:48].view(3, 16), EPS)
            return part
        if operation == "silu_and_mul":
            return CPU.silu_and_mul(part)
        CPU.rotate(part, Rotation(table, torch.arange(MANY)[rows]), 4)
        return part

    whole = run(slice(0, MANY))
    for rows in (slice(0, 1), slice(3, 10), slice(MANY - 1, MANY)):
        assert torch.equal(run(rows), whole[rows])
