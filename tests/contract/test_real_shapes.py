"""Every real Qwen2 shape on 1 to 8 shards in every format: built without weights, each share as it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.build import make_model
from engine.models.qwen2 import Qwen2ForCausalLM
from parallel.state import ParallelState
from quant.config import resolve_quantization
from quant.dense import DenseMethod
from tests.contract.harness import KERNELS

SIZES = range(1, 9)
SHAPES = {
    "0.5B": {"hidden": 896, "heads": 14, "kv_heads": 2, "inner": 4864, "vocab": 151936},
    "1.5B": {"hidden": 1536, "heads": 12, "kv_heads": 2, "inner": 8960, "vocab": 151936},
    "3B": {"hidden": 2048, "heads": 16, "kv_heads": 2, "inner": 11008, "vocab": 151936},
    "7B": {"hidden": 3584, "heads": 28, "kv_heads": 4, "inner": 18944, "vocab": 152064},
    "14B": {"hidden": 5120, "heads": 40, "kv_heads": 8, "inner": 13824, "vocab": 152064},
    "32B": {"hidden": 5120, "heads": 40, "kv_heads": 8, "inner": 27648, "vocab": 152064},
    "72B": {"hidden": 8192, "heads": 64, "kv_heads": 8, "inner": 29568, "vocab": 152064},
    "72B, padded for AWQ": {"hidden": 8192, "heads": 64, "kv_heads": 8, "inner": 29696, "vocab": 152064},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128, "strategy": "group"}}
    },
}
STORED: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq, 8 bits": {**GPTQ, "bits": 8},
    "gptq, 3 bits": {**GPTQ, "bits": 3},
    "gptq, 2 bits": {**GPTQ, "bits": 2},
    "gptq, groups of 32": {**GPTQ, "group_size": 32},
    "gptq, one group": {**GPTQ, "group_size": -1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "compressed-tensors": COMPRESSED,
}
ON_LOAD = ("dense", "eetq", "int4")


def make(shape: dict[str, int], layout: str, rank: int, size: int, *, is_exact: bool) -> Qwen2ForCausalLM:
    config = {
        "model_type": "qwen2",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": 1,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    modules += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    marker = "weight_scale" if layout == "compressed-tensors" else "qweight"
    names = [f"model.layers.0.{module}.{marker}" for module in modules] if layout in STORED else []
    flag = layout if layout in ("eetq", "int4") else None
    dense = DenseMethod(torch.float32, computes_in_float32=True)
    quantization = resolve_quantization(
        flag, None, STORED.get(layout), names, dense, matrices=KERNELS.matrices, is_exact=is_exact
    )
    model = make_model(config, quantization, torch.float32, KERNELS, ParallelState(rank, size))
    assert isinstance(model, Qwen2ForCausalLM)
    return model


@pytest.mark.parametrize("is_exact", [True, False], ids=["exact", "rounding"])
@pytest.mark.parametrize("layout", [*ON_LOAD, *STORED])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_1_to_8_shards(shape: dict[str, int], layout: str, is_exact: bool) -> None:
    head_dim = shape["hidden"] // shape["heads"]
    for size in SIZES:
        widths = []
        for rank in range(size):
            model = make(shape, layout, rank, size, is_exact=is_exact)
            heads = model.attention_shape
            assert heads.head_dim == head_dim
            assert heads.num_heads % heads.num_kv_heads == 0
            inputs = model.layers[0].mlp.down_proj.input_widths
            assert sum(inputs) == shape["inner"]
            widths.append((heads.num_heads, heads.num_kv_heads, inputs[rank]))
        assert sum(num_heads for num_heads, _, _ in widths) == shape["heads"]
        assert sum(kv for _, kv, _ in widths) == max(shape["kv_heads"], size)
        inner = [width for _, _, width in widths]
        unit = 64 if layout in (*ON_LOAD, "gptq, groups of 32", "gptq, one group") else 128
        assert max(inner) - min(inner) <= unit, "a share is at most one unit larger than another"
        assert all(width % unit == 0 for width in inner)
