"""FP8 checkpoints (quant_method fp8) by transformers 5.17.0, in the environment of quant_llmcompressor.py.

    PYTHONPATH=tests:. OMP_NUM_THREADS=1 llmcompressor/bin/python tests/oracles/quant_transformers.py [CASE...]

transformers quantizes only where there is a GPU, though its arithmetic runs anywhere: it is told that there is one.
Beside each checkpoint it is noted how far its own dequantisation is from dequantize.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from oracles.dequantize import dequantize, read_tensors
from oracles.quant_source import Case, write_cases
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

CASES = [
    Case(name=name, source=source, dtype=dtype, options=options)
    for name, source, dtype, options in (
        ("fp8-block-16x64", "zeros", torch.float16, {"weight_block_size": (16, 64)}),
        (
            "fp8-block-skips",
            "untied",
            torch.bfloat16,
            {"weight_block_size": (32, 32), "modules_to_not_convert": ["k_proj", "lm_head"]},
        ),
        ("fp8-tensor", "small", torch.bfloat16, {"weight_block_size": None}),
    )
]


def quantize(case: Case, source: Path, target: Path) -> dict[str, Any]:
    FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **kwargs: None
    settings = FineGrainedFP8Config(**case.options)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=case.dtype, quantization_config=settings)
    model.save_pretrained(str(target))
    return check(settings, target)


def check(settings: Any, folder: Path) -> dict[str, Any]:
    weights, stored = dequantize(folder), read_tensors(folder)
    own = Fp8Dequantize(None)
    modules = [name.removesuffix(".weight_scale_inv") for name in stored if name.endswith(".weight_scale_inv")]
    difference = 0.0
    for module in modules:
        q, scale = (torch.from_numpy(stored[f"{module}.{kind}"].copy()) for kind in ("weight", "weight_scale_inv"))
        theirs = own._dequantize_one(q, scale, torch.float32)
        ours = torch.from_numpy(weights[f"{module}.weight"])
        difference = max(difference, float((theirs - ours).abs().max()))
    return {"tool_forward": f"dequantisation of {len(modules)} linears", "tool_difference": difference}


def main() -> None:
    write_cases(CASES, sys.argv[1:], "transformers", ("transformers", "torch"), quantize)


if __name__ == "__main__":
    main()
