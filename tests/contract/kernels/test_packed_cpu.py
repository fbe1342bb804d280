"""The 8- and 4-bit CPU kernels have the bits of the dense kernel on the widened weights, for any number of rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from quant.base import PackedWeight
from quant.kernels import choose_kernel
from quant.kernels.dense_cpu import DenseCpu
from quant.kernels.dense_rows import TILE_OUTPUTS
from quant.kernels.packed_cpu import MIN_ROW_BLOCK, PackedCpu
from quant.kernels.packed_torch import PackedTorch
from quant.packing import pack_groups, widen

ROWS = [1, 2, 3, 4, 5, 8, MIN_ROW_BLOCK + 1]
HALVES = [torch.float16, torch.bfloat16]
FORMS = [(4, 16), (4, 64), (4, 192), (3, 32), (2, 96), (8, 8), (8, 192)]
"""Bits and the size of a group."""
IN_FLOAT32 = [pytest.param(torch.float32, *form, marks=() if form[0] == 8 else pytest.mark.long) for form in FORMS]
"""Scales in float32. A layout with other scales is a kernel of its own, which takes 13 s to compile."""


def random_weight(
    bits: int,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype = torch.float16,
    *,
    has_unordered_groups: bool = False,
) -> PackedWeight:
    generator = torch.Generator().manual_seed(n + k)
    num_groups = k // group_size
    q = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, num_groups, generator=generator) * 0.01 + 0.001).to(dtype)
    zero_points = torch.randint(0, 2**bits + 1, (n, num_groups), generator=generator)
    groups = torch.arange(k) // group_size
    if has_unordered_groups:
        groups = groups[torch.randperm(k, generator=generator)]
    bias = torch.randn(n, generator=generator)
    return pack_groups(q, scales, zero_points, bits=bits, group_of_input=groups, bias=bias)


@pytest.mark.parametrize(
    ("dtype", "bits", "group_size"), [*((dtype, *form) for dtype in HALVES for form in FORMS), *IN_FLOAT32], ids=str
)
@pytest.mark.parametrize("n", [TILE_OUTPUTS, 4 * TILE_OUTPUTS + 5, 3])
def test_bits_are_those_of_the_dense_kernel(dtype: torch.dtype, bits: int, group_size: int, n: int) -> None:
    packed = random_weight(bits, n, 192, group_size, dtype)
    kernel = choose_kernel("cpu", packed)
    assert isinstance(kernel, PackedCpu)
    dense = DenseCpu(PackedWeight("dense", widen(packed), packed.bias))
    generator = torch.Generator().manual_seed(1)
    for rows in ROWS:
        x = torch.randn(rows, 192, generator=generator)
        if dtype == torch.float32:  # a full scale times an integer is rounded: close, and the same for every row count
            torch.testing.assert_close(kernel(x), dense(x), atol=1e-4, rtol=1e-4)
            assert torch.equal(kernel(x)[0], kernel(x[:1])[0])
        else:
            assert torch.equal(kernel(x), dense(x))


@pytest.mark.parametrize("group_size", [8, 32, 256])
@pytest.mark.parametrize("n", [4 * TILE_OUTPUTS + 5, 2 * TILE_OUTPUTS])
def test_every_8_bit_float_is_widened_exactly(n: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(n)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 127 == 127] = 1  # the two NaN: no checkpoint with them is loaded
    weight = torch.stack([codes[torch.randperm(256, generator=generator)] for _ in range(n)])
    scales = torch.rand(n, 256 // group_size, generator=generator).mul_(1e-3)
    zero_points = torch.zeros(scales.shape, dtype=torch.int32)
    packed = PackedWeight("fp8", weight, torch.randn(n, generator=generator), scales, zero_points)
    dense = DenseCpu(PackedWeight("dense", widen(packed), packed.bias))
    for rows in ROWS:
        x = torch.randn(rows, 256, generator=generator)
        assert torch.equal(choose_kernel("cpu", packed)(x), dense(x))
        torch.testing.assert_close(PackedTorch(packed)(x), dense(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_scattered_groups_gather_the_inputs(bits: int) -> None:
    packed = random_weight(bits, 24, 128, 32, has_unordered_groups=True)
    assert packed.input_order is not None
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    expected = x @ widen(packed).T + packed.bias
    torch.testing.assert_close(choose_kernel("cpu", packed)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_unordered_groups", [True, False])
def test_the_reference_agrees(bits: int, has_unordered_groups: bool) -> None:
    packed = random_weight(bits, 40, 128, 32, has_unordered_groups=has_unordered_groups)
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(PackedCpu(packed)(x), PackedTorch(packed)(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_rows_and_no_bias(bits: int) -> None:
    packed = dataclasses.replace(random_weight(bits, 24, 64, 32), bias=None)
    assert choose_kernel("cpu", packed)(torch.empty(0, 64)).shape == (0, 24)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(choose_kernel("cpu", packed)(x), x @ widen(packed).T, atol=1e-4, rtol=1e-4)


def test_other_devices_run_the_reference() -> None:
    assert isinstance(choose_kernel("torch", random_weight(4, 12, 64, 32)), PackedTorch)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_unordered_groups", [True, False])
def test_the_reference_widens_some_outputs_at_a_time(
    bits: int, has_unordered_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of 152,064 outputs would be several gigabytes in float32."""
    packed = random_weight(bits, 40, 128, 32, has_unordered_groups=has_unordered_groups)
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    whole = PackedTorch(packed)(x)
    widened: list[int] = []

    def watched_widen(part: PackedWeight) -> torch.Tensor:
        widened.append(part.weight.shape[0])
        return widen(part)

    monkeypatch.setattr("quant.kernels.packed_torch.OUTPUTS_AT_A_TIME", 16)
    monkeypatch.setattr("quant.kernels.packed_torch.widen", watched_widen)
    torch.testing.assert_close(PackedTorch(packed)(x), whole, atol=1e-5, rtol=1e-5)
    assert widened == [16, 16, 8]
