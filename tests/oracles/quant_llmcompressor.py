"""compressed-tensors checkpoints (pack-quantized, int-quantized, float-quantized) by llmcompressor 0.14.0.1.

    python3.11 -m venv llmcompressor
    llmcompressor/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    PYTHONPATH=tests:. OMP_NUM_THREADS=1 llmcompressor/bin/python tests/oracles/quant_llmcompressor.py [CASE...]

(That takes transformers 5.17.0 and compressed-tensors 0.19.0.) Beside each checkpoint it is noted how far the
decompressor of compressed-tensors is from dequantize.py rounded to the dtype of the scales.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from oracles.dequantize import dequantize, read_tensors
from oracles.quant_source import Case, calibration_ids, write_cases
from transformers import AutoModelForCausalLM

MODIFIERS = {"gptq": GPTQModifier, "rtn": QuantizationModifier}


def integers(bits: int, group_size: int, is_symmetric: bool = True) -> dict[str, Any]:
    """A scheme's weights; a group size of -1 is the strategy `channel`."""
    grouping = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    return {"num_bits": bits, "type": "int", "symmetric": is_symmetric, **grouping}


def groups(**weights_of: dict[str, Any]) -> dict[str, Any]:
    """config_groups: regular expressions (or Linear) -> weights."""
    return {
        f"group_{number}": {"targets": [target if target == "Linear" else f"re:.*{target}"], "weights": weights}
        for number, (target, weights) in enumerate(weights_of.items())
    }


def bytes_of(kind: str, strategy: str, *, is_static: bool = False, **more: Any) -> dict[str, Any]:
    """config_groups of 8 bits for weights and activations; a static scheme stores a scale of the activations."""
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    activations = {"strategy": "tensor", "dynamic": False} if is_static else {"strategy": "token", "dynamic": True}
    weights = {**common, "strategy": strategy, **more}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {**common, **activations}}}


HEAD = ["lm_head"]
SKIPS = ["lm_head", "re:.*o_proj", "model.layers.0.mlp.gate_proj"]
MIXED = groups(self_attn=integers(4, 32), mlp=integers(8, -1, is_symmetric=False))
CASES = [
    Case(
        name=name,
        source=source,
        dtype=dtype,
        options={"modifier": modifier, "config_groups": config_groups, "ignore": ignore},
    )
    for name, source, dtype, modifier, config_groups, ignore in (
        ("w4-g32", "small", torch.bfloat16, "gptq", groups(Linear=integers(4, 32)), HEAD),
        ("w4-g128", "base", torch.bfloat16, "gptq", groups(Linear=integers(4, 128)), HEAD),
        ("w4-g32-zeros", "zeros", torch.bfloat16, "gptq", groups(Linear=integers(4, 32, False)), HEAD),
        ("w4-channel", "small", torch.bfloat16, "gptq", groups(Linear=integers(4, -1)), HEAD),
        ("w4-channel-asym", "odd", torch.bfloat16, "rtn", groups(Linear=integers(4, -1, False)), HEAD),
        ("w4-g32-odd", "odd", torch.float16, "rtn", groups(Linear=integers(4, 32)), HEAD),
        ("w4-g128-ragged", "ragged", torch.bfloat16, "rtn", groups(Linear=integers(4, 128)), HEAD),
        ("w8-g32", "small", torch.float16, "rtn", groups(Linear=integers(8, 32)), HEAD),
        ("w8-g32-zeros", "zeros", torch.bfloat16, "gptq", groups(Linear=integers(8, 32, False)), HEAD),
        ("w8-channel", "small", torch.bfloat16, "gptq", groups(Linear=integers(8, -1)), HEAD),
        ("w4-g32-skips", "small", torch.bfloat16, "gptq", groups(Linear=integers(4, 32)), SKIPS),
        ("w4-g32-lm-head", "untied", torch.bfloat16, "rtn", groups(Linear=integers(4, 32)), []),
        ("mixed", "small", torch.bfloat16, "rtn", MIXED, HEAD),
        ("w3-g32", "small", torch.bfloat16, "rtn", groups(Linear=integers(3, 32)), HEAD),
        ("w8a8-asym", "zeros", torch.float16, "rtn", bytes_of("int", "channel", symmetric=False), HEAD),
        ("w8a8-tensor-static", "odd", torch.bfloat16, "rtn", bytes_of("int", "tensor", is_static=True), HEAD),
        ("w8a8-lm-head", "untied", torch.bfloat16, "rtn", bytes_of("int", "channel"), []),
        ("fp8-static", "odd", torch.bfloat16, "rtn", bytes_of("float", "tensor", is_static=True), HEAD),
        ("fp8-block", "ragged", torch.bfloat16, "rtn", bytes_of("float", "block", block_structure=[128, 128]), HEAD),
        ("fp8-lm-head", "untied", torch.bfloat16, "rtn", bytes_of("float", "channel"), []),
    )
]


def quantize(case: Case, source: Path, target: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=case.dtype)
    options = case.options
    modifier = MODIFIERS[options["modifier"]](config_groups=options["config_groups"], ignore=options["ignore"])
    rows = calibration_ids()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model,
        dataset=data if options["modifier"] == "gptq" or "static" in case.name else None,
        recipe=modifier,
        max_seq_length=64,
        num_calibration_samples=len(rows),
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    model.save_pretrained(str(target), save_compressed=True)
    return check(model, target)


def check(model: Any, folder: Path) -> dict[str, Any]:
    weights, stored = dequantize(folder), read_tensors(folder)
    difference, num_linears = 0.0, 0
    for name, module in model.named_modules():
        scheme: QuantizationScheme | None = getattr(module, "quantization_scheme", None)
        if f"{name}.weight_scale" not in stored or scheme is None:
            continue
        kinds = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        tensors = {kind: stored[f"{name}.{kind}"] for kind in kinds if f"{name}.{kind}" in stored}
        own_input = {
            kind: torch.from_numpy(tensor.copy().view("int32") if tensor.dtype == "uint32" else tensor.copy())
            for kind, tensor in tensors.items()
        }
        own_input["weight_scale"] = own_input["weight_scale"].to(model.dtype)
        is_packed = "weight_packed" in tensors
        compressor: Any = PackedQuantizationCompressor if is_packed else NaiveQuantizationCompressor
        own = compressor.decompress(own_input, scheme)["weight"]
        ours = torch.from_numpy(weights[f"{name}.weight"]).to(own.dtype)
        difference = max(difference, float((own.float() - ours.float()).abs().max()))
        num_linears += 1
    return {"tool_forward": f"decompress of {num_linears} linears ({model.dtype})", "tool_difference": difference}


def main() -> None:
    write_cases(
        CASES,
        sys.argv[1:],
        "llmcompressor",
        ("llmcompressor", "compressed-tensors", "transformers", "torch"),
        quantize,
    )


if __name__ == "__main__":
    main()
