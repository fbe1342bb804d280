"""Checkpoints by AutoRound 0.16.1 (the package `auto-round`): GPTQ's and AWQ's tensors under settings of its own.

    python3.11 -m venv autoround
    autoround/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate auto-round==0.16.1
    PYTHONPATH=tests:. OMP_NUM_THREADS=1 autoround/bin/python tests/oracles/quant_autoround.py [CASE...]

Beside each checkpoint it is noted how far the tool's own modules, filled with the stored tensors and given the unit
matrix, are from dequantize.py rounded to float16, in which they compute.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing  # noqa: E402
from auto_round.export.export_to_awq.utils import dequantize_gemm  # noqa: E402
from oracles.dequantize import dequantize  # noqa: E402
from oracles.quant_source import Case, calibration_ids, write_cases  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

DOWN, K = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"
MIXED = {DOWN: {"bits": 8, "group_size": 64}, K: {"bits": 16}}
HEAD = {"lm_head": {"bits": 8, "group_size": 32}}

CASES = [
    Case(
        name=name,
        source=source,
        dtype=torch.bfloat16,
        options={"bits": bits, "group_size": group_size, "sym": sym, "layer_config": layer_config, "format": form},
    )
    for name, source, bits, group_size, sym, layer_config, form in (
        ("w4-g32-zeros-gptq", "zeros", 4, 32, False, None, "auto_round:auto_gptq"),
        ("w4-g32-awq", "zeros", 4, 32, False, None, "auto_round"),
        ("w4-g32-mixed", "small", 4, 32, True, MIXED, "auto_round"),
        ("w4-g32-mixed-zeros", "zeros", 4, 32, False, MIXED, "auto_round"),
        ("w4-g32-lm-head", "untied", 4, 32, True, HEAD, "auto_round"),
        ("w4-g32-qwen3moe", "experts", 4, 32, True, None, "auto_round"),
        ("w5-g32", "small", 5, 32, True, None, "auto_round"),
    )
]


def quantize(case: Case, source: Path, target: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    options = dict(case.options)
    form = options.pop("format")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=case.dtype)
    rows = [torch.tensor([ids]) for ids in calibration_ids()]
    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(source),
        dataset=rows,
        iters=2,
        nsamples=len(rows),
        seqlen=rows[0].shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        **options,
    )
    tool.quantize_and_save(str(target), format=form)
    for path in [*target.glob("*/*")]:  # it makes a folder of its own
        path.rename(target / path.name)
    return check(target)


@torch.inference_mode()
def check(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored, weights = load_file(next(folder.glob("*.safetensors"))), dequantize(folder)
    difference, modules = 0.0, sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight"))
    for module in modules:
        own = own_weight(settings["packing_format"], {name: stored[f"{module}.{name}"] for name in PARTS})
        ours = torch.from_numpy(weights[f"{module}.weight"]).half()
        difference = max(difference, float((own.float() - ours.float()).abs().max()))
    return {"tool_forward": f"own modules of {len(modules)} linears (float16)", "tool_difference": difference}


PARTS = ("qweight", "qzeros", "scales")


def own_weight(packing: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [n, k] float16 that the tool's own module multiplies with."""
    num_groups, num_outputs = parts["scales"].shape
    bits = 32 * parts["qzeros"].shape[1] // num_outputs
    num_inputs = parts["qweight"].shape[0] * (1 if "awq" in packing else 32 // bits if bits != 3 else 1)
    num_inputs = num_inputs * 32 // 3 if bits == 3 else num_inputs
    group_size = num_inputs // num_groups
    if "awq" in packing:
        weight: torch.Tensor = dequantize_gemm(*(parts[name] for name in PARTS), bits, group_size)
        return weight.T
    module = dynamic_import_quant_linear_for_packing(packing, bits, group_size, True)(
        bits, group_size, num_inputs, num_outputs, bias=False
    )
    module.load_state_dict(parts, strict=False)
    own: torch.Tensor = module(torch.eye(num_inputs, dtype=torch.float16))
    return own.T


def main() -> None:
    write_cases(CASES, sys.argv[1:], "autoround", ("auto-round", "transformers", "torch"), quantize)


if __name__ == "__main__":
    main()
