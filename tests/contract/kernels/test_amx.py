"""Products by AMX: every bit by the rule, at the edges of tiles, whatever runs beside a row; and what is without it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.base import PackedWeight, RowGroups
from quant.kernels import bfloat16_cpu, choose_kernel
from quant.kernels.amx import HAS_AMX, TILE_ROWS
from quant.kernels.arrays import observed_calls
from quant.kernels.bfloat16_amx_cpu import ROW_BYTES, Bfloat16Amx
from quant.kernels.bfloat16_cpu import MAX_INPUTS, Bfloat16Cpu
from quant.kernels.coded_ops import HAS_TABLES
from quant.kernels.finished_rows_ops import STEP_INPUTS
from quant.kernels.grouped_cpu import GroupedIntegerCpu
from quant.kernels.integer_amx_rows import AMX_BLOCK, MIN_ROUNDED_ROWS
from quant.kernels.integer_cpu import NO_ROWS, ROW_BLOCK, IntegerCpu
from quant.kernels.program_cpu import Arena, Program, Recording
from quant.kernels.rounded_rows import MIN_AMX_ROWS

pytestmark = pytest.mark.skipif(not HAS_AMX, reason="the processor has no AMX")
ROW_COUNTS = [*range(1, 5), 8, *range(TILE_ROWS - 1, TILE_ROWS + 3), 31, 32, 33, 49, 70]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(n_size: int, k_size: int, *, is_coded: bool, is_gated: bool = False) -> PackedWeight:
    """Weights too different in magnitude to be coded or, if `is_coded`, of which five pairs at most have no code."""
    weight = random(n_size, k_size, seed=1)
    if not is_coded:
        weight *= torch.linspace(-90, 0, k_size).exp2()
    else:
        weight[0, 0] = weight[n_size // 2, k_size // 2] = weight[n_size - 1, k_size - 1] = 2.0**40
        if k_size > STEP_INPUTS:  # neighbours, and two of a step
            weight[0, 3] = weight[n_size // 2, k_size // 2 + 3] = 2.0**-40
    return PackedWeight("dense", weight.bfloat16(), random(n_size, seed=2), is_gated=is_gated)


def by_the_rule(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Rounded rows; of 32 inputs the even ones' products are added apart from the odd ones', then both to the total."""
    assert weight.bias is not None
    rows, outputs = (factor.bfloat16().double() for factor in (x, weight.weight))
    total = torch.zeros(len(x), len(weight.weight))
    for first in range(0, x.shape[1], STEP_INPUTS):
        sums = [torch.zeros_like(total) for _ in range(2)]
        for k in range(first, first + STEP_INPUTS):
            sums[k % 2] = (sums[k % 2].double() + rows[:, None, k] * outputs[:, k]).float()
        total = total + (sums[0] + sums[1])
    return total + weight.bias


@pytest.mark.parametrize("is_coded", [False, True])
@pytest.mark.parametrize("k_size", [32, 896])
@pytest.mark.parametrize("n_size", [1, 33, 127])
def test_every_bit_is_that_of_the_rule(n_size: int, k_size: int, is_coded: bool) -> None:
    weight, x = dense(n_size, k_size, is_coded=is_coded), random(max(ROW_COUNTS), k_size)
    kernel, expected = Bfloat16Amx(weight), by_the_rule(x, weight)
    assert kernel.is_coded == (is_coded and HAS_TABLES and k_size > STEP_INPUTS)
    for rows in ROW_COUNTS:
        for start in (0, 1, len(x) - rows):
            part = slice(start, start + rows)
            assert torch.equal(kernel(x[part].contiguous()), expected[part]), "whatever runs beside it"


@pytest.mark.parametrize("is_coded", [False, True])
@pytest.mark.parametrize("k_size", [MAX_INPUTS + 32, 2 * MAX_INPUTS + 96])
def test_sums_wait_between_stretches_and_rows_beyond_a_block_are_rows_like_any_other(
    k_size: int, is_coded: bool
) -> None:
    row_block = ROW_BYTES // (2 * MAX_INPUTS // 2)  # stretches have more than half as many inputs
    weight = dense(104, k_size, is_coded=is_coded)  # four tiles: more than one for a thread
    x = random(row_block + 7, k_size)
    kernel = Bfloat16Amx(weight)
    assert kernel.is_coded == (is_coded and HAS_TABLES)
    whole = kernel(x)
    assert torch.equal(whole[:2], by_the_rule(x[:2], weight))
    for rows in (1, TILE_ROWS, 2 * TILE_ROWS + 5, row_block):
        for start in (0, len(x) - rows):
            assert torch.equal(kernel(x[start : start + rows].contiguous()), whole[start : start + rows])


@pytest.mark.skipif(not HAS_TABLES, reason="the processor has no AVX512-VBMI")
def test_codes_and_gates_have_the_bits_of_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = dense(64, 896, is_coded=True, is_gated=True), random(70, 896)
    coded = Bfloat16Amx(weight)
    monkeypatch.setattr(bfloat16_cpu, "HAS_TABLES", False)
    plain = Bfloat16Amx(weight)
    assert (coded.is_coded, plain.is_coded) == (True, False)
    for rows in ROW_COUNTS:
        part = x[:rows].contiguous()
        assert torch.equal(coded(part), plain(part))
        assert torch.equal(coded.gated(part), plain.gated(part))
        gate, value = coded(part).chunk(2, dim=1)
        torch.testing.assert_close(coded.gated(part), torch.nn.functional.silu(gate) * value)


@pytest.mark.parametrize("is_coded", [False, True])
def test_a_product_that_follows_reads_gates_as_they_were_written_for_it(is_coded: bool) -> None:
    first = Bfloat16Amx(dense(2 * 896, 896, is_coded=is_coded, is_gated=True))
    second = Bfloat16Amx(dense(64, 896, is_coded=is_coded))
    assert first.is_coded == second.is_coded == (is_coded and HAS_TABLES)
    others = [Bfloat16Amx(dense(64, 928, is_coded=is_coded)), Bfloat16Cpu(dense(64, 896, is_coded=is_coded))]
    for rows in [0, *ROW_COUNTS]:
        x = random(rows, 896)
        plain, written = first.gated(x), first.gated(x, second)
        assert written.dtype == torch.bfloat16 and written.shape == plain.shape
        assert torch.equal(second(written), second(plain))
        for other in others:
            assert torch.equal(first.gated(x, other), plain), "it reads another form, or has other inputs"


@pytest.mark.parametrize("is_coded", [False, True])
def test_a_row_alone_has_the_bits_that_it_has_beside_others_at_the_ends_of_floats(is_coded: bool) -> None:
    """One row takes other instructions, which know smaller numbers, and multiply what is no number with 0."""
    weight = dense(64, 896, is_coded=is_coded)
    weight.weight[5, 7], weight.weight[6, 8], weight.weight[7, 9] = torch.inf, -torch.inf, torch.nan
    weight.weight[8] = 0
    weight.weight[8, :4] = torch.tensor([1.5 * 2.0**-126, -(2.0**-126), 2.0**-130, -(2.0**-127)])
    weight.weight[9] = -weight.weight[8]
    assert weight.bias is not None
    weight.bias[8:10] = 0
    kernel, x = Bfloat16Amx(weight), random(20, 896)
    x[0], x[1, 3], x[2, 4], x[3, 7] = 1.0, torch.inf, torch.nan, 0.0
    x[4, :4], x[5] = torch.tensor([1.0, 1.0, 2.0**100, -(2.0**-20)]), 2.0**-130
    together = kernel(x)
    alone = torch.cat([kernel(row) for row in x.split(1)])
    is_number = ~together.isnan()
    assert torch.equal(is_number, ~alone.isnan())
    assert torch.equal(together[is_number].view(torch.int32), alone[is_number].view(torch.int32)), "with their signs"
    assert together[0, 8] == 0, "a difference that is too small"


def test_no_rows_and_what_is_not_a_number() -> None:
    kernel, x = Bfloat16Amx(dense(12, 64, is_coded=True)), random(20, 64)
    assert kernel(torch.empty(0, 64)).shape == (0, 12)
    x[4, 3], x[17, 0] = torch.nan, torch.inf
    assert kernel(x).isfinite().all(dim=1).tolist() == [row not in (4, 17) for row in range(20)]


def quantized(layout: str, n_size: int, k_size: int, num_groups: int) -> PackedWeight:
    rng = torch.Generator().manual_seed(1)
    if layout == "int8":
        weight = torch.randint(-128, 128, (n_size, k_size), generator=rng, dtype=torch.int8)
        zeros = torch.randint(-128, 128, (n_size, num_groups), generator=rng, dtype=torch.int32)
    else:
        weight = torch.randint(0, 256, (n_size, k_size // 2), generator=rng, dtype=torch.uint8)
        zeros = torch.randint(0, 16, (n_size, num_groups), generator=rng, dtype=torch.int8)
    scales = torch.rand(n_size, num_groups, generator=rng) / 100
    return PackedWeight(layout, weight, random(n_size, seed=2), scales=scales, zero_points=zeros, is_gated=True)


INTEGER_SIZES = [(96, 128, 1), (64, 128, 2), (96, 896, 7), (70, 896, 1), (33, 256, 8)]
"""Outputs, inputs, groups."""
INTEGERS = [
    # One group of 4 bits has a kernel of its own, which takes 15 s to compile, and which hardly any checkpoint uses.
    pytest.param(layout, *sizes, marks=pytest.mark.long if layout == "int4" and sizes[2] == 1 else ())
    for sizes in INTEGER_SIZES
    for layout in ("int8", "int4")
]


@pytest.mark.parametrize(("layout", "n_size", "k_size", "num_groups"), INTEGERS)
def test_integer_rows_have_the_bits_that_each_has_alone(layout: str, n_size: int, k_size: int, num_groups: int) -> None:
    """One row is multiplied by other instructions. Groups of 32 inputs are, too, whatever the number of rows."""
    kernel, x = IntegerCpu(quantized(layout, n_size, k_size, num_groups)), random(4 * AMX_BLOCK + 13, k_size)
    x[5], x[9, 7] = 0.0, 1e6
    kinds: list[Any] = [kernel.__call__, *([kernel.gated] if kernel.num_gates else [])]
    for product in kinds:
        alone = torch.cat([product(row[None].contiguous()) for row in x])
        for rows in (MIN_AMX_ROWS, MIN_AMX_ROWS + 1, AMX_BLOCK, AMX_BLOCK + 1, 2 * AMX_BLOCK + TILE_ROWS, len(x)):
            for start in (0, len(x) - rows):
                assert torch.equal(product(x[start : start + rows].contiguous()), alone[start : start + rows])


GATES = 512
GATE_ROWS = (
    0,
    1,
    *(MIN_ROUNDED_ROWS + more for more in (-1, 0, 1, TILE_ROWS - 1, AMX_BLOCK + 1)),
    ROW_BLOCK,
    ROW_BLOCK + 17,
)


def gates_and_reader(layout: str, num_groups: int, num_inputs: int = 128) -> tuple[IntegerCpu, IntegerCpu]:
    return (
        IntegerCpu(quantized(layout, 2 * GATES, num_inputs, 1 if layout == "int8" else 2)),
        IntegerCpu(dataclasses.replace(quantized(layout, 64, GATES, num_groups), is_gated=False)),
    )


def is_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit, but for the bits of what is not a number."""
    same_bits = a.view(torch.int32) == b.view(torch.int32)
    return a.shape == b.shape and bool((same_bits | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize(("layout", "num_groups"), [("int8", 1), ("int8", 8), ("int4", 4), ("int4", 8)])
def test_gates_that_are_rounded_for_their_reader_give_it_the_bits_of_float32(layout: str, num_groups: int) -> None:
    """A group is 128 or 64 gates. Fewer rows, and few for many threads, are float32 under the same dtype."""
    first, second = gates_and_reader(layout, num_groups)
    x = random(max(GATE_ROWS), 128)
    x[2], x[3, 7], x[AMX_BLOCK + 1, 3], x[TILE_ROWS] = 0.0, torch.inf, torch.nan, 1e30
    num_units = GATES // 64 if num_groups == 8 else GATES // 128  # of a block
    for num_threads, min_rows in (
        (1, MIN_ROUNDED_ROWS),
        (2, MIN_ROUNDED_ROWS),
        (3, MIN_ROUNDED_ROWS + (num_units == 4)),  # threads share a group
        (9, ROW_BLOCK if num_units == 8 else ROW_BLOCK + 1),
    ):
        first._num_threads = second._num_threads = num_threads
        for rows in GATE_ROWS:
            part = x[:rows].contiguous()
            plain, written = first.gated(part), first.gated(part, second)
            assert written.dtype == torch.int8 and len(written) == rows
            assert is_alike(second(written), second(plain)), (num_threads, rows)
            assert is_alike(written.view(torch.float32), plain) == (rows < min_rows)


def test_gates_are_float32_for_who_can_not_read_them_otherwise() -> None:
    first, second = gates_and_reader("int8", 4)
    x = random(MIN_ROUNDED_ROWS, 128)
    plain = first.gated(x)
    ordered = dataclasses.replace(quantized("int8", 40, GATES, 4), input_order=torch.arange(GATES).flip(0))
    small_groups = IntegerCpu(quantized("int8", 40, GATES, 16))
    assert small_groups.min_amx_rows == NO_ROWS
    others = [IntegerCpu(quantized("int8", 40, 2 * GATES, 4)), IntegerCpu(ordered), small_groups]
    others.append(Bfloat16Amx(dense(64, GATES, is_coded=False)))
    for other in others:
        assert torch.equal(first.gated(x, other), plain)
    second._num_threads = first._num_threads + 1
    assert torch.equal(first.gated(x, second), plain), "it would not see whether they are rounded"


def test_rounded_gates_of_long_rows_wait_in_blocks() -> None:
    """Rows of many inputs are multiplied a block at a time, each with a group of its own gates."""
    first, second = gates_and_reader("int8", 4, 8192)
    x = random(MIN_ROUNDED_ROWS + AMX_BLOCK + 1, 8192)
    for num_threads in (1, 2):
        first._num_threads = second._num_threads = num_threads
        assert torch.equal(second(first.gated(x, second)), second(first.gated(x)))


def test_a_program_rounds_gates_by_the_rows_of_its_step() -> None:
    first, second = gates_and_reader("int8", 4)
    max_rows = max(GATE_ROWS)
    for recorded in (2, max_rows):
        start = random(recorded, 128)
        recording = Recording(Arena(), [start], (recorded, recorded), (max_rows, max_rows))
        with observed_calls(recording):
            result = second(first.gated(start, second))
        assert recording.refusal is None
        program = Program(recording, result)
        for rows in GATE_ROWS[1:]:
            x = random(rows, 128, seed=rows)
            program.run([x], (rows, rows))
            assert program.result is not None
            assert torch.equal(program.result, second(first.gated(x))), (recorded, rows)


@pytest.mark.parametrize(("layout", "num_groups"), [("int8", 2), ("int4", 2), ("int4", 4)])
def test_rows_of_experts_may_begin_anywhere(layout: str, num_groups: int) -> None:
    """Matrices have several tiles, and some of them more rows than a block."""
    matrices = [quantized(layout, 200, 256, num_groups) for _ in range(4)]
    for index, packed in enumerate(matrices):
        packed.weight[:, 0] = index
    counts = torch.tensor([5, 0, 33, 2 * AMX_BLOCK + 3])
    starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).to(torch.int32)
    x, rows = random(int(counts.sum()), 256), torch.arange(int(counts.sum()), dtype=torch.int32)
    chosen = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
    groups = RowGroups(starts, torch.tensor([3, 0, 2, 3, 0], dtype=torch.int32), chosen, rows)
    kernels = [IntegerCpu(packed) for packed in matrices]
    alone = [kernels[matrix](row[None]) for matrix, row in zip(chosen.tolist(), x, strict=True)]
    assert torch.equal(GroupedIntegerCpu(matrices)(x, groups), torch.cat(alone))


def test_extreme_integers_are_exact() -> None:
    """The largest sums there are: float32 has them, zero points taken off or not."""
    for weight, zero in ((-128, 127), (127, -128), (127, 127)):
        packed = PackedWeight(
            "int8",
            torch.full((32, 128), weight, dtype=torch.int8),
            scales=torch.ones(32, 1),
            zero_points=torch.full((32, 1), zero, dtype=torch.int32),
        )
        x = torch.full((MIN_AMX_ROWS, 128), 127.0)
        x[1::2] *= -1
        expected = 127.0 * 128 * (weight - zero) * torch.tensor([1.0, -1.0]).repeat(MIN_AMX_ROWS // 2)
        assert torch.equal(IntegerCpu(packed)(x), expected[:, None].expand(-1, 32))


def test_who_gets_tiles() -> None:
    assert type(choose_kernel("cpu", dense(12, 64, is_coded=True), is_exact=False)) is Bfloat16Amx
    assert Bfloat16Amx.why_not(PackedWeight("dense", torch.zeros(4, 48).bfloat16())) == [
        "input sizes must be a multiple of 32, not 48"
    ]


REFUSED = """
import torch
torch.cpu._init_amx = lambda: False
from quant.base import PackedWeight
from quant.kernels import choose_kernel
from quant.kernels.amx import HAS_AMX
from tests.contract.kernels.test_amx import integers_of_many_rows
kernel = choose_kernel("cpu", PackedWeight("dense", torch.ones(64, 64).bfloat16()), is_exact=False)
print(HAS_AMX, type(kernel).__name__, kernel(torch.ones(40, 64))[39, 63].item(), integers_of_many_rows())
"""


def integers_of_many_rows() -> str:
    """Every bit of a product that AMX makes where it may."""
    return IntegerCpu(quantized("int8", 32, 128, 1))(random(2 * AMX_BLOCK, 128)).numpy().tobytes().hex()


def test_a_process_that_may_not_use_tiles_does_without_them_in_kernels_that_others_compiled() -> None:
    """It shares their folder, and using a tile would end it."""
    expected = integers_of_many_rows()
    done = subprocess.run(
        [sys.executable, "-c", REFUSED],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.split() == ["False", "Bfloat16Cpu", "64.0", expected], done.stderr
