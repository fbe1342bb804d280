"""Kernels that round activations equal those in torch, are exact in integers, and ignore the number of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numba import njit

from quant.base import PackedWeight
from quant.kernels import choose_kernel
from quant.kernels.arrays import LINE_BYTES
from quant.kernels.integer_cpu import FOUND, OUTPUTS, ROWS, IntegerCpu, interleave
from quant.kernels.integer_ops import (
    CHUNK,
    INSTRUCTIONS,
    Instructions,
    find_instructions,
    make_round_group,
    make_tile,
)
from quant.kernels.packed_cpu import PackedCpu
from quant.kernels.rounded_torch import RoundedTorch, activation_group, round_activations
from quant.kernels.simd import enabled_features
from quant.packing import widen
from tests.contract.kernels.test_packed_cpu import random_weight

needs_instructions = pytest.mark.skipif(FOUND is None, reason="the processor has none of the instruction sets")
ROW_COUNTS = [1, 2, 3, ROWS // 2, ROWS, 2 * ROWS - 1, 2 * ROWS + 3]


def random_rows(rows: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def symmetric_bytes(n: int, k: int) -> PackedWeight:
    """Weights as `--quantize eetq` makes them."""
    generator = torch.Generator().manual_seed(n)
    q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    bias = torch.randn(n, generator=generator)
    scales = torch.rand(n, 1, generator=generator) * 0.01
    return PackedWeight("int8", q, bias, scales, torch.zeros(n, 1, dtype=torch.int32))


WEIGHTS = {
    "eetq": symmetric_bytes(2 * OUTPUTS, 384),
    "eetq, odd": symmetric_bytes(OUTPUTS + 5, 384),
    "4 bits, groups of 64": random_weight(4, 2 * OUTPUTS, 384, 64),
    "4 bits, groups of 32": random_weight(4, OUTPUTS, 384, 32, torch.bfloat16),
    "4 bits, groups of 96": random_weight(4, OUTPUTS, 384, 96),
    "4 bits, one group": random_weight(4, 3, 384, 384),
    "4 bits, groups of 128": random_weight(4, OUTPUTS, 384, 128),
    "4 bits, scattered": random_weight(4, OUTPUTS, 384, 64, has_unordered_groups=True),
    "8 bits, groups of 64": random_weight(8, OUTPUTS, 384, 64),
}


@needs_instructions
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_reference_agrees(name: str) -> None:
    packed = WEIGHTS[name]
    kernel = choose_kernel("cpu", packed, is_exact=False)
    assert isinstance(kernel, IntegerCpu)
    reference = RoundedTorch(packed)
    for rows in ROW_COUNTS:
        x = random_rows(rows, 384)
        torch.testing.assert_close(kernel(x), reference(x), atol=2e-5, rtol=2e-5)


@needs_instructions
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_rows_bits_do_not_depend_on_the_others(name: str) -> None:
    kernel = IntegerCpu(WEIGHTS[name])
    x = random_rows(2 * ROWS + 3, 384)
    whole = kernel(x)
    for rows in ROW_COUNTS:
        for first in (0, x.shape[0] - rows):
            assert torch.equal(kernel(x[first : first + rows].contiguous()), whole[first : first + rows])


@needs_instructions
@pytest.mark.parametrize("name", WEIGHTS)
def test_rounding_costs_about_what_eight_bits_must(name: str) -> None:
    """0.3 to 0.7 % of the length of an output row: half a step of 1/127 of the largest of a group, at random."""
    packed = dataclasses.replace(WEIGHTS[name], bias=None)
    weight = widen(packed)
    weight -= weight.mean(dim=1, keepdim=True)  # random zero points would hide the error behind a large common part
    x = random_rows(64, 384)
    exact = x @ weight.T
    assert packed.scales is not None
    group = activation_group(384 // packed.scales.shape[1])
    assert group is not None
    integers, scales = round_activations(x, group)
    error = (integers * scales[:, :, None]).flatten(1) @ weight.T - exact
    assert 0.003 < error.norm() / exact.norm() < 0.008


def runnable() -> list[Instructions]:
    """AVX512's 256-bit forms run what AVX-VNNI runs."""
    features = enabled_features()
    if "avx512vnni" in features:
        features.add("avxvnni")
    return [isa for isa in INSTRUCTIONS if isa.feature in features]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("isa", runnable(), ids=lambda isa: isa.feature)
def test_integers_are_exact_at_their_ends(isa: Instructions, rows: int) -> None:
    """Nothing saturates or wraps: the largest weights of either sign with the largest activations of either sign."""
    tile = make_tile(isa, rows)

    @njit
    def multiply(x, x_scales, x_sums, group, w, scales, zeros, groups, bias, out, n, k):  # type: ignore[no-untyped-def]
        tile(x, x_scales, x_sums, 0, group, w, scales, zeros, groups, bias, out, 0, 0, n, k, 0, 1)

    generator = np.random.default_rng(0)
    n, k, group = isa.units * isa.lanes, 4 * CHUNK, 2 * CHUNK
    x = generator.choice([-127, 127, 0, 1], (rows, k)).astype(np.int8)
    x[:, :group] = 127
    for bits, lowest in ((8, -128), (4, 0)):
        highest = lowest + 2**bits - 1
        q = generator.choice([lowest, highest], (n, k))
        q[0], q[1] = lowest, highest
        shift = 128 if bits == 8 and not isa.is_signed else 0
        stored = torch.from_numpy((q + shift).astype(np.uint8))
        zeros = generator.integers(0, 16, (2, n)).astype(np.int32)
        scales: npt.NDArray[Any] = np.ones((2 * n // isa.lanes, isa.lanes), np.float32)
        out = np.zeros(rows * n, np.float32)
        multiply(
            x.ravel(),
            np.ones(rows * 2, np.float32),
            x.reshape(rows * 2, group).sum(axis=1, dtype=np.int32),
            group,
            interleave(stored, isa, bits).view(torch.int8 if bits == 8 else torch.uint8).numpy(),
            scales,
            np.ascontiguousarray((zeros + shift).reshape(2, -1, isa.lanes).transpose(1, 0, 2)).ravel(),
            2,
            np.zeros(n, np.float32),
            out,
            n,
            k,
        )
        differences = q - np.repeat(zeros.T, group, axis=1)
        expected = x.astype(np.int64) @ differences.T.astype(np.int64)
        np.testing.assert_array_equal(out.reshape(rows, n), expected)


def rounded(x: torch.Tensor, lanes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers, written with a line between each two, scale and sum."""
    round_group = make_round_group(lanes)

    @njit
    def call(x, integers, scales, sums):  # type: ignore[no-untyped-def]
        round_group(x, 0, len(x), integers, LINE_BYTES, 2 * LINE_BYTES, scales, sums, 0)

    integers, scales, sums = np.zeros(2 * len(x), np.int8), np.zeros(1, np.float32), np.zeros(1, np.int32)
    call(x.numpy(), integers, scales, sums)
    between, written = torch.from_numpy(integers).view(-1, 2, LINE_BYTES).unbind(dim=1)
    assert not between.any()
    return written.flatten(), torch.from_numpy(scales), torch.from_numpy(sums)


HALVES = torch.cat([torch.arange(-31, 32) + 0.5, torch.tensor([127.0])])


@pytest.mark.parametrize(
    "x",
    [
        random_rows(1, 128)[0],
        HALVES,  # to the even neighbour
        torch.zeros(64),
        torch.full((64,), 1e-38),
        torch.cat([torch.full((63,), 1e-3), torch.tensor([-3e38])]),
    ],
    ids=["random", "halves", "zeros", "tiny", "huge"],
)
@pytest.mark.parametrize("lanes", [8, 16])
def test_activations_are_rounded_as_the_reference_does(x: torch.Tensor, lanes: int) -> None:
    integers, scales, sums = rounded(x, lanes)
    expected, expected_scales = round_activations(x[None], len(x))
    assert torch.equal(integers, expected.flatten().to(torch.int8))
    assert torch.equal(scales, expected_scales.flatten())
    assert sums.item() == expected.sum()


@needs_instructions
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_not_rounded_away(bad: float) -> None:
    x = random_rows(2, 384)
    x[1, 100] = bad
    for name in ("eetq", "4 bits, groups of 64"):
        out = IntegerCpu(WEIGHTS[name])(x)
        assert out[0].isfinite().all()
        assert out[1].isnan().all()


def test_groups_that_do_not_fit_run_in_float32() -> None:
    assert [activation_group(size) for size in (16, 32, 64, 96, 128, 896, 48)] == [None, 32, 64, 32, 128, 128, None]
    assert isinstance(choose_kernel("cpu", random_weight(4, 24, 384, 16), is_exact=False), PackedCpu)
    assert isinstance(choose_kernel("cpu", random_weight(4, 24, 384, 64), is_exact=True), PackedCpu)


@needs_instructions
def test_no_rows_and_no_bias() -> None:
    kernel = IntegerCpu(dataclasses.replace(WEIGHTS["eetq"], bias=None))
    assert kernel(torch.empty(0, 384)).shape == (0, 2 * OUTPUTS)
    x = random_rows(3, 384)
    bias = WEIGHTS["eetq"].bias
    torch.testing.assert_close(kernel(x) + bias, IntegerCpu(WEIGHTS["eetq"])(x), atol=1e-6, rtol=1e-6)


def test_the_best_instruction_set_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(features: str) -> str | None:
        monkeypatch.setattr("numba.config.CPU_FEATURES", features)
        isa = find_instructions()
        return isa and isa.feature

    assert found("+avx2,+avx512vnni,+avxvnni") == "avx512vnni"
    assert found("+avx2,-avx512vnni,+avxvnni") == "avxvnni"
    assert found("+avx2,-avxvnni") == "avx2"
    assert found("+neon,+dotprod") == "dotprod"
    assert found("+neon") is None
