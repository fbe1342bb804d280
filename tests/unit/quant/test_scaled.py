"""Matrices of 8-bit floats and integers with a scale for each block: any size of block, whole and cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.layers.norm import RMSNorm
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.state import ParallelState
from quant.base import FormatError, MatrixKernel, PackedWeight
from quant.compressed_tensors import CompressedTensorsFormat
from quant.dense import DenseMethod
from quant.fp8 import Fp8Format
from quant.on_load import Int8Method
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


@pytest.mark.parametrize("is_float", [True, False])
@pytest.mark.parametrize("zero_point_dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_what_a_checkpoint_says_of_activations_is_not_read(
    is_float: bool, zero_point_dtype: torch.dtype, strategy: str
) -> None:
    """And zero points of symmetric weights, which older versions of llm-compressor write in the weight's own type."""
    weights = {"num_bits": 8, "type": "float" if is_float else "int", "strategy": strategy, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "format": "naive-quantized"}
    method = CompressedTensorsFormat({"config_groups": {"group_0": group}}).method_for("any")
    params, expected = stored_matrix((1 if strategy == "channel" else WHOLE, WHOLE), (8, 16), is_float=is_float)
    stored = {
        **params,
        "input_scale": torch.rand(1),
        "input_zero_point": torch.zeros(1).to(zero_point_dtype),
        "weight_zero_point": torch.zeros(params["weight_scale"].shape).to(zero_point_dtype),
    }
    for shards in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        kept, parallel = Kept(), ParallelState(0, len(shards))
        layer = ColumnParallelLinear(
            16, [8], has_bias=False, methods=[method], kernels=kept, parallel=parallel, outputs=shards[:1]
        )
        for name, tensor in stored.items():
            cut = layer.cut(name, 0, tensor.shape)
            layer.load(name, 0, tensor if cut is None else tensor[(*[slice(None)] * cut[0], cut[1])])
        layer.finish(torch.device("cpu"))
        assert torch.equal(widen(kept[0]), expected[shards[0]])


@pytest.mark.parametrize(
    ("is_float", "dtype"),
    [
        (True, torch.bfloat16),
        (True, torch.float32),
        (True, torch.float8_e5m2),
        (False, torch.int32),
        (False, torch.uint8),
    ],
)
def test_a_weight_that_is_not_stored_in_8_bits_is_refused(is_float: bool, dtype: torch.dtype) -> None:
    params, _ = stored_matrix((1, WHOLE), (8, 16), is_float=is_float)
    params["weight"] = params["weight"].float().to(dtype)
    expected = torch.float8_e4m3fn if is_float else torch.int8
    with pytest.raises(FormatError, match=f"belongs to a weight in {dtype}, which has to be {expected}: fetch"):
        ScaledMethod((1, WHOLE), is_float).pack(params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [DenseMethod, Int8Method])
def test_8_bit_floats_without_a_scale_are_not_taken_for_weights(dtype: torch.dtype, method: type) -> None:
    """A matrix that lacks its scale counts as dense."""
    dense = DenseMethod(dtype, computes_in_float32=True) if method is DenseMethod else method()
    layer = ColumnParallelLinear(16, [8], has_bias=False, methods=[dense], kernels=Kept(), parallel=ParallelState())
    weight = torch.ones(8, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"is stored as torch\.float8_e4m3fn, and no scale says what these numbers"):
        layer.load("weight", 0, weight)
    norm = RMSNorm(16, 1e-6, dtype)
    with pytest.raises(ValueError, match="no scale says"):
        norm.load("weight", 0, weight[0])
