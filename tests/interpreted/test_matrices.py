"""Matrix products in Triton against widened weights in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.base import PackedWeight
from quant.kernels import choose_kernel
from quant.kernels.matrix_triton import MatrixTriton
from quant.kernels.packed_torch import PackedTorch
from quant.kernels.skinny_triton import BLOCK_ROWS, MAX_ROWS, min_block_inputs, skinny_product
from quant.kernels.tuning import Tile, WeightShape, tile_for
from quant.packing import OUTPUTS_AT_A_TIME, pack_groups, widen
from tests.interpreted.closeness import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GROUP_SIZES = {"int8": [8, 16, 24, 64, 128], "int4": [16, 32, 48, 64, 128]}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The form of a weight."""

    layout: str
    num_outputs: int
    group_size: int
    num_groups: int
    has_order: bool = False
    has_bias: bool = True

    @property
    def num_inputs(self) -> int:
        return self.group_size * self.num_groups

    def pack(self, dtype: torch.dtype) -> PackedWeight:
        """Random numbers; dense weights and the scales are stored in `dtype`."""
        generator = torch.Generator().manual_seed(self.num_outputs + self.num_inputs)
        shape = self.num_outputs, self.num_inputs
        bias = torch.randn(self.num_outputs, generator=generator) if self.has_bias else None
        if self.layout == "dense":
            return PackedWeight("dense", torch.randn(shape, generator=generator).to(dtype), bias)
        bits = 8 if self.layout == "int8" else 4
        q = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
        scales = (torch.rand(self.num_outputs, self.num_groups, generator=generator) * 0.1).to(dtype)
        zero_points = torch.randint(0, 2**bits + 1, scales.shape, generator=generator)
        groups = torch.arange(self.num_inputs) // self.group_size
        if self.has_order:
            groups = groups[torch.randperm(self.num_inputs, generator=generator)]
        packed = pack_groups(q, scales, zero_points, bits=bits, group_of_input=groups, bias=bias)
        assert packed.layout == self.layout
        return packed


@st.composite
def matrices(draw: st.DrawFn) -> Matrix:
    layout = draw(st.sampled_from(["dense", "int8", "int4"]))
    num_outputs = draw(st.sampled_from([1, 3, 16, 31, 32, 33, 65]))
    if layout == "dense":
        return Matrix(layout, num_outputs, draw(st.sampled_from([1, 8, 40, 64, 129, 320])), 1)
    size, groups = draw(st.sampled_from(GROUP_SIZES[layout])), draw(st.integers(1, 5))
    is_whole = draw(st.booleans())
    return Matrix(
        layout,
        num_outputs,
        size * groups if is_whole else size,
        1 if is_whole else groups,
        has_order=draw(st.booleans()),
        has_bias=draw(st.booleans()),
    )


def random_x(num_rows: int, num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(num_rows)).to(dtype)


def product(packed: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """The product in float64."""
    bias = 0.0 if packed.bias is None else packed.bias.double()
    return x.double() @ exact_weight(packed).T + bias


def exact_weight(packed: PackedWeight) -> torch.Tensor:
    if packed.scales is None:
        return packed.weight.double()
    return widen(dataclasses.replace(packed, scales=packed.scales.float())).double()


def poisoned(num_rows: int, packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((num_rows, packed.weight.shape[0]), torch.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    matrix=matrices(),
    num_rows=st.sampled_from([1, 2, 5, 16, 17, 64]),
    splits=st.integers(1, 5),
    block_outputs=st.sampled_from([16, 32]),
    scale_dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=20)
def test_few_rows(
    dtype: torch.dtype, matrix: Matrix, num_rows: int, splits: int, block_outputs: int, scale_dtype: torch.dtype
) -> None:
    packed = matrix.pack(dtype if matrix.layout == "dense" else scale_dtype)
    group_size = matrix.group_size if matrix.num_groups > 1 else 0
    shape = WeightShape(matrix.layout, matrix.num_outputs, matrix.num_inputs, group_size)
    tile = tile_for(shape, min_inputs=min_block_inputs(matrix.layout))
    tile = Tile(block_outputs, tile.block_inputs, splits)
    x, out = random_x(num_rows, matrix.num_inputs, dtype), poisoned(num_rows, packed, dtype)
    skinny_product(packed, group_size, tile, x, out)
    assert_close(out, product(packed, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@given(matrix=matrices())
@settings(max_examples=12)
def test_more_rows_than_a_tile_has(dtype: torch.dtype, matrix: Matrix) -> None:
    packed = matrix.pack(dtype)
    x = random_x(MAX_ROWS + 1, matrix.num_inputs, dtype)
    assert_close(MatrixTriton(packed)(x), product(packed, x), num_roundings=2)


@pytest.mark.parametrize("layout", ["int8", "int4"])
def test_widened_weights_in_bfloat16(layout: str) -> None:
    """The product with the unit matrix is the weight itself."""
    packed = Matrix(layout, 17, 32, 3, has_order=True, has_bias=False).pack(torch.float16)
    units = torch.eye(packed.num_inputs).to(torch.bfloat16)
    assert_close(MatrixTriton(packed)(units), exact_weight(packed).T)


@pytest.mark.parametrize("layout", ["int8", "int4"])
def test_weights_with_offsets_run_in_the_reference(layout: str) -> None:
    packed = Matrix(layout, 40, 64, 2).pack(torch.float16)
    assert packed.scales is not None
    packed = dataclasses.replace(packed, zero_points=torch.rand(packed.scales.shape))
    kernel = choose_kernel("triton", packed)
    assert isinstance(kernel, PackedTorch)
    x = random_x(3, packed.num_inputs, torch.float32)
    torch.testing.assert_close(kernel(x), product(packed, x).float())


def test_many_outputs_are_widened_part_by_part() -> None:
    packed = Matrix("int8", OUTPUTS_AT_A_TIME + 9, 16, 1).pack(torch.float32)
    x = random_x(MAX_ROWS + 1, 16, torch.float32)
    assert_close(MatrixTriton(packed)(x), product(packed, x))


@pytest.mark.parametrize("layout", ["dense", "int8", "int4"])
def test_a_row_has_the_same_bits_beside_any_others(layout: str) -> None:
    """As many rows as are padded alike: NumPy, which multiplies here, adds in an order of its own for each shape."""
    packed = Matrix(layout, 40, 64, 8, has_order=layout == "int4").pack(torch.float16)
    kernel = MatrixTriton(packed)
    x = random_x(BLOCK_ROWS[0], packed.num_inputs, torch.float16)
    whole = kernel(x)
    for rows in (slice(0, 1), slice(3, 5), slice(5, 16)):
        assert torch.equal(kernel(x[rows]), whole[rows])


@pytest.mark.parametrize("num_rows", [2, MAX_ROWS + 1])
def test_a_head_gives_logits_that_were_not_rounded(num_rows: int) -> None:
    """Float32 straight from the sums, where a product in the dtype of x would lose the low bits."""
    packed = Matrix("int8", 24, 64, 2).pack(torch.float16)
    x = random_x(num_rows, 128, torch.float16)
    logits = choose_kernel("triton", dataclasses.replace(packed, out_dtype=torch.float32))(x)
    assert logits.dtype == torch.float32
    if num_rows <= MAX_ROWS:
        assert_close(logits, product(packed, x))
        assert not torch.equal(logits.half().float(), logits)


def test_scales_may_be_stored_by_group() -> None:
    packed = Matrix("int4", 24, 32, 3).pack(torch.float16)
    assert packed.scales is not None and packed.zero_points is not None
    by_group = [tensor.T.contiguous().T for tensor in (packed.scales, packed.zero_points)]
    x = random_x(2, 96, torch.float16)
    transposed = dataclasses.replace(packed, scales=by_group[0], zero_points=by_group[1])
    assert torch.equal(MatrixTriton(transposed)(x), MatrixTriton(packed)(x))


def test_no_rows() -> None:
    packed = Matrix("int4", 24, 32, 2).pack(torch.float16)
    assert MatrixTriton(packed)(torch.empty(0, 64, dtype=torch.float16)).shape == (0, 24)
