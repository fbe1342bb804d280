"""Matrices of 8-bit floats and integers with a scale for each block: any size of block, whole and cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.state import ParallelState
from quant.base import FormatError, MatrixKernel, PackedWeight
from quant.fp8 import Fp8Format
from quant.packing import widen
from quant.scaled import WHOLE, ScaledMethod


class Kept(list[PackedWeight]):
    """Takes the packed weights in place of kernels."""

    def __call__(self, packed: PackedWeight) -> MatrixKernel:
        self.append(packed)
        return lambda x: x  # type: ignore[return-value]


def stored_matrix(
    block: tuple[int, int], shape: tuple[int, int], *, is_float: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random tensors, and the matrix that they stand for."""
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(shape, generator=generator).mul(60).clamp(-127, 127)
    weight = q.to(torch.float8_e4m3fn) if is_float else q.to(torch.int8)
    sizes = [size if of_block == WHOLE else of_block for size, of_block in zip(shape, block, strict=True)]
    scales = torch.rand([-(-size // of) for size, of in zip(shape, sizes, strict=True)], generator=generator)
    rows, columns = (torch.arange(size) // of for size, of in zip(shape, sizes, strict=True))
    return {"weight": weight, "weight_scale": scales}, weight.float() * scales[rows][:, columns]


@given(
    block=st.tuples(st.sampled_from([WHOLE, 1, 16, 24, 128]), st.sampled_from([WHOLE, 8, 20, 24, 128])),
    shape=st.tuples(st.integers(1, 9).map(lambda n: 8 * n), st.integers(1, 9).map(lambda n: 8 * n)),
    is_float=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_a_matrix_is_what_its_blocks_say(block: tuple[int, int], shape: tuple[int, int], is_float: bool) -> None:
    params, expected = stored_matrix(block, shape, is_float=is_float)
    method = ScaledMethod(block, is_float)
    specs = method.param_specs(shape[1], shape[0], False)
    assert all(params[name].numel() == torch.Size(specs[name].shape).numel() for name in params)
    packed = method.pack(params)
    assert torch.equal(widen(packed), expected)
    assert packed.layout == ("dense" if block[1] == 20 < shape[1] else "fp8" if is_float else "int8")


@pytest.mark.parametrize("block", [(16, 24), (1, WHOLE), (WHOLE, WHOLE), (48, 8), (128, 128)])
@pytest.mark.parametrize("is_column", [True, False])
def test_shards_that_begin_within_a_block_have_its_scale(block: tuple[int, int], is_column: bool) -> None:
    shape = (96, 72)
    params, expected = stored_matrix(block, shape, is_float=True)
    size = shape[0] if is_column else shape[1]
    edges = [0, 8, 24, 56, size]
    shards = [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]
    for rank, shard in enumerate(shards):
        kept, parallel, method = Kept(), ParallelState(rank, len(shards)), ScaledMethod(block, is_float=True)
        layer = (
            ColumnParallelLinear(
                72, [96], has_bias=False, methods=[method], kernels=kept, parallel=parallel, outputs=[shard]
            )
            if is_column
            else RowParallelLinear(shards, 96, method=method, kernels=kept, parallel=parallel)
        )
        for name, tensor in params.items():
            cut = layer.cut(name, 0, tensor.shape)
            layer.load(name, 0, tensor if cut is None else tensor[(*[slice(None)] * cut[0], cut[1])])
        layer.finish(torch.device("cpu"))
        assert torch.equal(widen(kept[0]), expected[shard] if is_column else expected[:, shard])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("names", [("weight_scale", "input_scale"), ("weight_scale_inv", "activation_scale")])
def test_a_scale_of_a_whole_matrix_has_any_shape_and_either_name(names: tuple[str, str], shape: tuple[int]) -> None:
    params, expected = stored_matrix((WHOLE, WHOLE), (8, 16), is_float=True)
    scale, activation = names
    kept, method = Kept(), Fp8Format({"quant_method": "fp8", "activation_scheme": "static"}).method_for("any")
    layer = ColumnParallelLinear(16, [8], has_bias=False, methods=[method], kernels=kept, parallel=ParallelState())
    stored = {
        "weight": params["weight"],
        scale: params["weight_scale"].reshape(shape),
        activation: torch.rand(shape),
    }
    for name, tensor in stored.items():
        assert layer.cut(name, 0, tensor.shape) is None
        layer.load(name, 0, tensor)
    assert layer.missing(0) == []
    layer.finish(torch.device("cpu"))
    assert torch.equal(widen(kept[0]), expected)


def test_a_matrix_without_a_scale_is_refused() -> None:
    params, _ = stored_matrix((WHOLE, WHOLE), (8, 16), is_float=True)
    method = Fp8Format({"quant_method": "fp8"}).method_for("any")
    with pytest.raises(FormatError, match="has no weight_scale_inv or weight_scale: fetch the model again"):
        method.pack({"weight": params["weight"]})
