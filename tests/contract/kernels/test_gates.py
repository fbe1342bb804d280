"""Products with gates: the bits of two kernels one after the other, whatever a tile is, and the same matrix without."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit, types
from numba.extending import intrinsic

from engine.layers.cpu import CpuOps
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.partition import length, split_units
from parallel.state import ParallelState
from quant.base import AdapterRows, GatedKernel, LowRankKernel, LowRankShape, LowRankUpdate, PackedWeight
from quant.dense import DenseMethod
from quant.kernels import choose_kernel, make_low_rank_kernel
from quant.kernels.amx import HAS_AMX
from quant.kernels.bfloat16_cpu import Bfloat16Cpu
from quant.kernels.gates_ops import gate_order, output_columns
from quant.kernels.integer_cpu import FOUND, OUTPUTS, ROWS, IntegerCpu
from quant.kernels.integer_ops import INSTRUCTIONS
from quant.kernels.low_rank_cpu import LowRankCpu
from quant.kernels.simd import HAS_AVX512
from tests.contract.kernels.test_integer_cpu import random_rows, symmetric_bytes
from tests.contract.kernels.test_packed_cpu import random_weight

GATES = 48
"""Whole tiles of both kernels, whatever the instruction set."""
ROW_COUNTS = [1, 2, 3, ROWS - 1, ROWS, 13, 37]


def dense(num_outputs: int) -> PackedWeight:
    return PackedWeight("dense", random_rows(num_outputs, 384, seed=3).bfloat16(), random_rows(1, num_outputs)[0])


WEIGHTS = {
    "dense": dense(2 * GATES),
    "eetq": symmetric_bytes(2 * GATES, 384),
    "4 bits, groups of 64": random_weight(4, 2 * GATES, 384, 64),
    "4 bits, scattered": random_weight(4, 2 * GATES, 384, 64, has_unordered_groups=True),
    "8 bits, groups of 128": random_weight(8, 2 * GATES, 384, 128),
}


def kernels_of(packed: PackedWeight) -> tuple[Any, Any]:
    """The kernel without gates and that with gates."""
    if packed.layout == "dense":
        if not HAS_AVX512:
            pytest.skip("the processor has no AVX-512")
        return Bfloat16Cpu(packed), Bfloat16Cpu(dataclasses.replace(packed, is_gated=True))
    if FOUND is None:
        pytest.skip("the processor has none of the instruction sets")
    return IntegerCpu(packed), IntegerCpu(dataclasses.replace(packed, is_gated=True))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_bit_is_that_of_two_kernels(name: str) -> None:
    plain, gated = kernels_of(WEIGHTS[name])
    assert isinstance(gated, GatedKernel)
    assert (plain.num_gates, gated.num_gates) == (0, GATES)
    for rows in ROW_COUNTS:
        x = random_rows(rows, 384, seed=rows)
        whole = plain(x)
        assert torch.equal(gated(x), whole), "the product itself has its usual order"
        assert torch.equal(gated.gated(x), CpuOps().silu_and_mul(whole))


@pytest.mark.parametrize("name", ["dense", "eetq"])
def test_the_function_is_that_of_torch(name: str) -> None:
    """Gates far from zero on either side, where e^x reaches its ends."""
    plain, gated = kernels_of(WEIGHTS[name])
    x = random_rows(24, 384) * 10.0 ** torch.arange(-12, 12)[:, None]
    gate, value = plain(x).double().chunk(2, dim=1)
    assert gate.max() > 1e5 and gate.min() < -1e5
    torch.testing.assert_close(gated.gated(x), (torch.nn.functional.silu(gate) * value).float(), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["dense", "eetq"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row(name: str, bad: float) -> None:
    _, gated = kernels_of(WEIGHTS[name])
    x = random_rows(3, 384)
    x[1, 7] = bad
    is_number = gated.gated(x).isfinite()
    assert is_number[[0, 2]].all() and not is_number[1].all()


@pytest.mark.parametrize("name", ["dense", "eetq"])
def test_halves_that_end_within_a_vector_are_left_to_another_kernel(name: str) -> None:
    weight = dense(2 * (OUTPUTS + 5)) if name == "dense" else symmetric_bytes(2 * (OUTPUTS + 5), 384)
    plain, other = kernels_of(weight)
    x = random_rows(5, 384)
    assert other.num_gates == 0
    assert torch.equal(other(x), plain(x))


@pytest.mark.parametrize("isa", INSTRUCTIONS, ids=lambda isa: isa.feature)
def test_the_order_of_a_tile_is_where_it_is_written(isa: Any) -> None:
    @intrinsic
    def put_columns(typing_context, tile, gates, out):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[2])(context, builder, value=args[2]).data
            for u, column in enumerate(output_columns(builder, args[0], args[1], isa.units, isa.lanes)):
                builder.store(column, builder.gep(data, [args[0].type(u)]))
            return context.get_dummy_value()

        return types.none(types.intp, types.intp, out), codegen

    @njit
    def columns_of(tile, gates, out):  # type: ignore[no-untyped-def]
        put_columns(tile, gates, out)

    size = isa.units * isa.lanes
    for gates in (0, 3 * size // 2):
        order = gate_order(3 * size, gates, isa.lanes).reshape(3, isa.units, isa.lanes)
        for tile in range(3):
            out = np.zeros(isa.units, np.int64)
            columns_of(tile, gates, out)
            assert torch.equal(order[tile], torch.from_numpy(out)[:, None] + torch.arange(isa.lanes))


def layer_of(num_gates: int, *, is_exact: bool) -> ColumnParallelLinear:
    layer = ColumnParallelLinear(
        384,
        [num_gates, num_gates],
        has_bias=False,
        methods=[DenseMethod(torch.bfloat16, computes_in_float32=True)] * 2,
        kernels=lambda packed: choose_kernel("cpu", packed, is_exact=is_exact),
        parallel=ParallelState(),
        is_gated=True,
    )
    for part in range(2):
        layer.load("weight", part, random_rows(num_gates, 384, seed=part).bfloat16())
    layer.finish(torch.device("cpu"))
    return layer


def make_kernel(step: AdapterRows, inputs: int, outputs: Sequence[int], matrices: int, is_gated: bool) -> LowRankKernel:
    shape = LowRankShape(inputs, outputs, 1, 8, torch.float32, torch.device("cpu"), matrices, is_gated)
    return make_low_rank_kernel("cpu", shape, step)


def test_a_layer_lets_the_kernel_do_it_unless_something_comes_between() -> None:
    """A kernel in float32 has no gates. An adapter changes the product first; then its kernel takes the gates."""
    calls = []

    def gate(product: torch.Tensor) -> torch.Tensor:
        calls.append(product.shape)
        return CpuOps().silu_and_mul(product)

    x = random_rows(3, 384)
    layer = layer_of(GATES, is_exact=False)
    alone = layer.gated(x, gate)
    assert alone.shape == (3, GATES) and (not calls) == HAS_AVX512
    calls.clear()
    exact = layer_of(GATES, is_exact=True).gated(x, gate)
    torch.testing.assert_close(alone, exact, atol=2.0, rtol=0.1)
    assert calls == [(3, 2 * GATES)]
    step = AdapterRows()
    layer.allocate_adapters(functools.partial(make_kernel, step))
    calls.clear()
    assert torch.equal(layer.gated(x, gate), alone) and (not calls) == HAS_AVX512, "no row has an adapter"
    layer.put_adapter(0, [LowRankUpdate(torch.ones(8, 384), torch.ones(GATES, 8), 1.0), None])
    step.rows, step.slots = torch.arange(3), torch.tensor([-1, 0, -1])
    step.segments = [(0, 1, 2)]
    calls.clear()
    changed = layer.gated(x, gate)
    assert not calls, "the kernel of adapters takes the gates"
    assert torch.equal(changed, CpuOps().silu_and_mul(layer(x)))
    assert (changed == alone).all(dim=1).tolist() == [True, False, True], "rows without an adapter keep their bits"


def test_a_kernel_reads_alone_what_no_rank_and_no_adapter_reads() -> None:
    """Others would not know the form in which gates are written for it."""

    num_gates = 128  # AMX takes multiples of 32 inputs
    choose_rounding = functools.partial(choose_kernel, "cpu", is_exact=False)

    def down(parallel: ParallelState, *, is_gathered: bool) -> RowParallelLinear:
        shards = split_units(num_gates, parallel.size, 8)
        method = DenseMethod(torch.bfloat16, computes_in_float32=True)
        layer = RowParallelLinear(
            shards, 64, method=method, kernels=choose_rounding, parallel=parallel, is_gathered=is_gathered
        )
        stored = random_rows(64, num_gates, seed=3).bfloat16()
        cut = layer.cut("weight", 0, stored.shape)
        layer.load("weight", 0, stored if cut is None else stored.narrow(cut[0], cut[1].start, length(cut[1])))
        layer.finish(torch.device("cpu"))
        return layer

    two = ParallelState(rank=0, size=2)
    assert down(two, is_gathered=True).only_reader is None
    assert down(two, is_gathered=False).only_reader is not None, "its own inputs are its own alone"
    x, gates = random_rows(3, 384), layer_of(num_gates, is_exact=False)
    alone = down(ParallelState(), is_gathered=False)
    silu = CpuOps().silu_and_mul
    written, plain = gates.gated(x, silu, alone.only_reader), gates.gated(x, silu)
    assert (written.dtype == torch.bfloat16) == HAS_AMX, "it is told who reads"
    assert torch.equal(alone(written), alone(plain))
    step = AdapterRows()
    alone.allocate_adapters(functools.partial(make_kernel, step))
    assert alone.only_reader is not None, "no row has an adapter"
    assert torch.equal(alone(gates.gated(x, silu, alone.only_reader)), alone(plain))
    step.rows, step.slots, step.segments = torch.arange(3), torch.zeros(3, dtype=torch.int64), [(0, 0, 3)]
    assert alone.only_reader is None


def test_a_layer_whose_gates_fill_no_tiles_takes_those_of_the_changed_product() -> None:
    calls = []

    def gate(product: torch.Tensor) -> torch.Tensor:
        calls.append(product.shape)
        return CpuOps().silu_and_mul(product)

    layer, step = layer_of(40, is_exact=False), AdapterRows(torch.arange(3), torch.zeros(3, dtype=torch.int64))
    layer.allocate_adapters(functools.partial(make_kernel, step))
    layer.put_adapter(0, [LowRankUpdate(torch.ones(8, 384), torch.ones(40, 8), 1.0), None])
    x = random_rows(3, 384)
    assert torch.equal(layer.gated(x, gate), CpuOps().silu_and_mul(layer(x)))
    assert calls == [(3, 80)]


@pytest.mark.parametrize(
    "slots", [[0], [1], [-1, 0], [1, 1], [1, 0, 1], [*[1] * 7, -1, *[0] * 66, -1, 0, 1, 1, 1, 1]], ids=len
)
def test_an_adapters_kernel_gives_the_bits_of_its_changes_and_then_gates(slots: list[int]) -> None:
    """Rows with an adapter and without keep their bits in any order."""
    generator = torch.Generator().manual_seed(len(slots))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    step = AdapterRows()
    kernel = LowRankCpu(LowRankShape(64, [48, 48], 2, 16, torch.bfloat16, torch.device("cpu"), is_gated=True), step)
    kernel.put(0, [LowRankUpdate(random(12, 64), random(48, 12), 0.5), None])
    kernel.put(1, [LowRankUpdate(random(5, 64), random(48, 5), 2.0) for _ in range(2)])
    x, y = random(len(slots), 64), random(len(slots), 96)
    results = []
    for order in (torch.arange(len(slots)), torch.randperm(len(slots), generator=generator)):
        ordered = torch.tensor(slots)[order]
        step.slots, step.rows = ordered.sort(stable=True)
        changed = y[order]
        kernel.add_to(changed, x[order])
        gated = kernel.gated(y[order], x[order])
        assert torch.equal(gated, CpuOps().silu_and_mul(changed))
        results.append(gated[order.argsort()])
    assert torch.equal(*results)
    is_changed = ~(results[0] == CpuOps().silu_and_mul(y)).all(dim=1)
    assert is_changed.tolist() == [slot >= 0 for slot in slots]
