"""Blocks of every type are what llama.cpp's own package says, whatever their bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.state import ParallelState
from quant.base import FormatError
from quant.gguf import OFFSETS, SCALES, GgufFormat, GgufMethod, Q
from quant.gguf_blocks import TYPES, unpack_rows, widen_rows
from quant.packing import widen
from tests.unit.quant.test_scaled import Kept

HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
"""Places of a block's float16, where they are not at its start."""


def random_rows(type_name: str, num_rows: int, num_blocks: int) -> torch.Tensor:
    """Random bytes, with float16 that are numbers."""
    generator = np.random.default_rng(len(type_name) + num_rows)
    kind = TYPES[type_name]
    rows = generator.integers(0, 256, (num_rows * num_blocks, kind.bytes), dtype=np.uint8)
    has_offsets = kind.zero_point is None
    for place in HALVES.get(type_name, (0, 2) if has_offsets else (0,)):
        halves = generator.standard_normal((len(rows), 1)).astype(np.float16)
        rows[:, place : place + 2] = halves.view(np.uint8)
    return torch.from_numpy(rows.reshape(num_rows, -1))


@pytest.mark.parametrize("type_name", TYPES)
def test_a_type_has_the_numbers_of_the_package_gguf(type_name: str) -> None:
    kind, raw_type = TYPES[type_name], gguf.GGMLQuantizationType[type_name]
    assert gguf.GGML_QUANT_SIZES[raw_type] == (kind.inputs, kind.bytes)
    rows = random_rows(type_name, 16, 3)
    expected = dequantize(rows.numpy(), raw_type)
    np.testing.assert_array_equal(widen_rows(rows, type_name).numpy(), expected)
    packed = GgufMethod(type_name).pack(stored(rows, type_name))
    np.testing.assert_array_equal(widen(packed).numpy(), expected)
    assert packed.layout == ("int4" if kind.bits == 4 else "int8")


def stored(rows: torch.Tensor, type_name: str) -> dict[str, torch.Tensor]:
    q, scales, offsets = unpack_rows(rows, type_name)
    return {Q: q, SCALES: scales, **({} if offsets is None else {OFFSETS: offsets})}


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("is_column", [True, False])
def test_shards_begin_anywhere(type_name: str, is_column: bool) -> None:
    params = stored(random_rows(type_name, 256, 256 // TYPES[type_name].inputs), type_name)
    method = GgufMethod(type_name)
    expected = widen(method.pack(params))
    edges = [0, 8, 80, 112, 256]
    shards = [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]
    for rank, shard in enumerate(shards):
        kept, parallel = Kept(), ParallelState(rank, len(shards))
        layer = (
            ColumnParallelLinear(
                256, [256], has_bias=False, methods=[method], kernels=kept, parallel=parallel, outputs=[shard]
            )
            if is_column
            else RowParallelLinear(shards, 256, method=method, kernels=kept, parallel=parallel)
        )
        for name, tensor in params.items():
            cut = layer.cut(name, 0, tensor.shape)
            layer.load(name, 0, tensor if cut is None else tensor[(*[slice(None)] * cut[0], cut[1])])
        layer.finish(torch.device("cpu"))
        assert torch.equal(widen(kept[0]), expected[shard] if is_column else expected[:, shard])


def test_settings_of_a_file() -> None:
    made = GgufFormat({"quant_method": "gguf", "types": {"a": "Q4_K", "b": "Q6_K", "c": "Q4_K"}})
    assert made.description == "gguf, 2 x Q4_K, 1 x Q6_K"
    assert made.method_for("b") == GgufMethod("Q6_K") and made.method_for("d") is None
    with pytest.raises(FormatError, match="the file has matrices of type IQ2_S; only Q4_0, Q4_1, "):
        GgufFormat({"quant_method": "gguf", "types": {"a": "IQ2_S"}})
    with pytest.raises(FormatError, match="a matrix of 128 inputs can't be in blocks of 256, as Q4_K has them"):
        GgufMethod("Q4_K").param_specs(128, 8, False)
