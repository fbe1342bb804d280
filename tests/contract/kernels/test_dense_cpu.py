"""The CPU matrix product against that in torch, at the edges of tiles; and a row's bits whatever runs beside it."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from quant.base import PackedWeight
from quant.dense import DenseMethod
from quant.kernels import choose_kernel
from quant.kernels.dense_cpu import DenseCpu
from quant.kernels.dense_ops import SPLITS_PAIRS, WIDTH
from quant.kernels.dense_rows import TILE_OUTPUTS, rows_per_block
from quant.kernels.dense_torch import DenseTorch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64]


def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedWeight:
    return PackedWeight("dense", weight, bias)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_size", [8, 64, 136])
@pytest.mark.parametrize("n_size", [1, 3, 4, 11, 12, 13, 23, 24, 25, 47, 96])
def test_against_the_reference(dtype: torch.dtype, k_size: int, n_size: int) -> None:
    weight, bias = random(n_size, k_size, seed=1).to(dtype), random(n_size, seed=2)
    kernel, reference = DenseCpu(packed(weight, bias)), DenseTorch(packed(weight, bias))
    for rows in ROWS:
        x = random(rows, k_size)
        torch.testing.assert_close(kernel(x), reference(x), atol=2e-6 * k_size, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """Every product and sum fits the mantissa, so one wrong element, output or row would show."""
    for n_size in (TILE_OUTPUTS + 1, 2 * TILE_OUTPUTS):
        weight = random(n_size, 40).mul(4).round()
        bias = torch.arange(n_size) * 1000.0
        kernel = DenseCpu(packed(weight.to(dtype), bias))
        for rows in ROWS:
            x = random(rows, 40).mul(4).round()
            assert torch.equal(kernel(x), x @ weight.T + bias)


def test_without_a_bias() -> None:
    weight, x = random(13, 16), random(3, 16)
    assert torch.equal(DenseCpu(packed(weight, None))(x), DenseCpu(packed(weight, torch.zeros(13)))(x))


def order_of_additions(k_size: int, dtype: torch.dtype) -> list[int]:
    """The inputs as they are added, lane after lane."""
    whole = k_size // 16 * 16 if SPLITS_PAIRS and dtype == torch.bfloat16 else 0
    split = [first + k for first in range(0, whole, 16) for k in (*range(0, 16, 2), *range(1, 16, 2))]
    return [*split, *range(whole, k_size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_size", [8, 16, 96, 104])
def test_an_output_is_lanes_of_sums_folded_by_halves(k_size: int, dtype: torch.dtype) -> None:
    """Factors of 8 bits make products exact in float32, so that the order of additions alone decides the bits."""
    x, weight = (random(3, k_size, seed=seed).bfloat16().float() for seed in (0, 1))
    weight = weight.to(dtype).float()
    padded = -k_size % WIDTH
    products = (x[:, None] * weight[None])[..., order_of_additions(k_size, dtype)]
    products = torch.nn.functional.pad(products, (0, padded)).reshape(3, 3, -1, WIDTH)
    lanes = torch.zeros(3, 3, WIDTH)
    for step in range(products.shape[2]):
        lanes = lanes + products[:, :, step]
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, dim=-1)
        lanes = low + high
    assert torch.equal(DenseCpu(packed(weight.to(dtype), None))(x), lanes[..., 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_size", "k_size"), [(7, 96), (12, 104), (31, 96), (48, 96), (24, 1032)])
def test_a_row_does_not_depend_on_how_many_rows_there_are(dtype: torch.dtype, n_size: int, k_size: int) -> None:
    kernel = DenseCpu(packed(random(n_size, k_size, seed=1).to(dtype), random(n_size, seed=2)))
    x = random(64, k_size)
    whole = kernel(x)
    for rows in ROWS:
        for start in (0, 1, 64 - rows):
            part = x[start : start + rows].contiguous()
            assert torch.equal(kernel(part), whole[start : start + rows])


@pytest.mark.parametrize("k_size", [512, 4096])
def test_rows_beyond_one_row_block(k_size: int) -> None:
    """Activations are taken in blocks; the rows of the second block are rows like any other."""
    block = rows_per_block(k_size)
    x, weight = random(2 * block + 3, k_size), random(24, k_size, seed=1)
    kernel = DenseCpu(packed(weight, None))
    whole = kernel(x)
    torch.testing.assert_close(whole, x @ weight.T, atol=1e-3, rtol=1e-5)
    for row in (0, block - 1, block, 2 * block + 2):
        assert torch.equal(kernel(x[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("k_size", [896, 904, 1104])
def test_nothing_behind_the_last_weight_is_read(k_size: int) -> None:
    """The page behind the weights can't be read, as behind a file that is mapped: reading it ends this process."""
    num_bytes = TILE_OUTPUTS * k_size * 2
    first = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, first + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + first), mmap.PAGESIZE, 0) == 0
    weight = torch.frombuffer(memory, dtype=torch.bfloat16, count=TILE_OUTPUTS * k_size, offset=first - num_bytes)
    weight = weight.view(TILE_OUTPUTS, k_size).copy_(random(TILE_OUTPUTS, k_size))
    kernel, elsewhere = DenseCpu(packed(weight, None)), DenseCpu(packed(weight.clone(), None))
    for rows in (1, 2, 3, 4, 9):
        x = random(rows, k_size)
        assert torch.equal(kernel(x), elsewhere(x))


def test_no_rows() -> None:
    assert DenseCpu(packed(random(12, 8), None))(torch.empty(0, 8)).shape == (0, 12)


def test_not_a_number_stays_in_its_row() -> None:
    x = random(9, 16)
    x[4, 3] = torch.nan
    out = DenseCpu(packed(random(12, 16), None))(x)
    assert out.isnan().all(dim=1).tolist() == [row == 4 for row in range(9)]
    assert not out[:4].isnan().any() and not out[5:].isnan().any()


def test_input_sizes_that_are_no_multiple_of_eight_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8, not 20"):
        choose_kernel("cpu", packed(random(12, 20), None))


def test_the_table_gives_the_cpu_its_kernel_and_others_the_reference() -> None:
    assert isinstance(choose_kernel("cpu", packed(random(4, 8), None)), DenseCpu)
    assert isinstance(choose_kernel("torch", packed(random(4, 8), None)), DenseTorch)


@pytest.mark.parametrize(
    ("dtype", "computes_in_float32", "checkpoint", "weight", "bias"),
    [
        (torch.float32, True, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, True, torch.float16, torch.float16, torch.float32),
        (torch.float32, True, torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, True, torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, True, torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, False, torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, False, torch.float16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_weights_are_kept_in(
    dtype: torch.dtype, computes_in_float32: bool, checkpoint: torch.dtype, weight: torch.dtype, bias: torch.dtype
) -> None:
    method = DenseMethod(dtype, computes_in_float32=computes_in_float32)
    made = method.pack({"weight": torch.ones(2, 8, dtype=checkpoint), "bias": torch.ones(2, dtype=checkpoint)})
    assert made.bias is not None
    assert (made.weight.dtype, made.bias.dtype) == (weight, bias)
    assert method.is_copied("weight", checkpoint) is (checkpoint != weight)
