"""GPTQ checkpoints by AutoGPTQ 0.7.1, which no longer installs beside today's `transformers`.

    python3.11 -m venv auto-gptq
    auto-gptq/bin/pip install torch==2.13.0 transformers==4.51.3 auto-gptq==0.7.1 peft==0.11.1
    PYTHONPATH=tests OMP_NUM_THREADS=1 auto-gptq/bin/python tests/oracles/quant_auto_gptq.py [CASE...]

Its `from_pretrained` and its loop want CUDA, so the class is built directly and its CUDA device is pointed at the CPU;
arithmetic, packing and saving are its own. Beside each checkpoint it is noted how far AutoGPTQ's own CPU forward
(torch path, float32) of every linear is from dequantize.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import torch
from auto_gptq.modeling import _base, _utils
from auto_gptq.modeling._base import BaseQuantizeConfig
from auto_gptq.modeling.qwen2 import Qwen2GPTQForCausalLM
from oracles.dequantize import Zeros, dequantize
from oracles.quant_source import Case, calibration_ids, write_cases
from transformers import AutoModelForCausalLM

CASES = [
    Case(
        name=name,
        source=source,
        options={"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act, **more},
    )
    for name, source, bits, group_size, sym, desc_act, more in (
        ("4bit-g128", "base", 4, 128, True, False, {}),
        ("4bit-g32-act", "small", 4, 32, True, True, {}),
        ("4bit-g64-static", "base", 4, 64, True, True, {"static_groups": True}),
        ("4bit-g32-asym-static", "small", 4, 32, False, True, {"static_groups": True}),
        ("4bit-channel", "small", 4, -1, True, False, {}),
        ("4bit-channel-asym-act", "small", 4, -1, False, True, {}),
        ("4bit-g32-odd", "odd", 4, 32, False, False, {}),
        ("4bit-g128-ragged-act", "ragged", 4, 128, True, True, {}),
        ("4bit-g32-zeros", "zeros", 4, 32, False, False, {}),
        ("4bit-g32-zeros-act", "zeros", 4, 32, False, True, {}),
        ("3bit-g32-act", "small", 3, 32, True, True, {}),
        ("3bit-channel", "small", 3, -1, True, False, {}),
        ("3bit-g32-zeros", "zeros", 3, 32, False, False, {}),
        ("2bit-g32-asym", "small", 2, 32, False, False, {}),
        ("2bit-g32-act", "small", 2, 32, True, True, {}),
        ("2bit-g32-zeros-act", "zeros", 2, 32, False, True, {}),
        ("8bit-channel", "small", 8, -1, True, False, {}),
        ("8bit-g64-asym-act", "small", 8, 64, False, True, {}),
        ("8bit-g32-zeros", "zeros", 8, 32, False, False, {}),
    )
]


def quantize(case: Case, source: Path, target: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(source, torch_dtype=case.dtype, low_cpu_mem_usage=False)
    model.seqlen = model.config.max_position_embeddings
    wrapped = Qwen2GPTQForCausalLM(model.eval(), False, BaseQuantizeConfig(**case.options))
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration_ids()]
    wrapped.quantize([{key: torch.tensor([value]) for key, value in example.items()} for example in examples])
    wrapped.save_quantized(str(target), use_safetensors=True)
    return check(wrapped.model, target)


@torch.inference_mode()
def check(model: Any, folder: Path) -> dict[str, Any]:
    """Every linear's own forward of the unit matrix in float32 against each reading."""
    model.float()
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    forward_of = type(next(iter(linears.values()))).__module__.rpartition(".")[2]
    differences: dict[str, float] = {}
    try:
        own = {name: (module(torch.eye(module.infeatures)) - module.bias).T for name, module in linears.items()}
    except RuntimeError as error:
        return {"tool_forward": f"{forward_of} fails: {error}"}
    for zeros in get_args(Zeros):
        weights = dequantize(folder, zeros=zeros)
        differences[zeros] = max(float(abs(own[name].numpy() - weights[f"{name}.weight"]).max()) for name in own)
    return {"tool_forward": forward_of, "tool_difference": differences}


def main() -> None:
    _base.CUDA_0 = _utils.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    write_cases(CASES, sys.argv[1:], "auto-gptq", ("auto-gptq", "transformers", "torch"), quantize)


if __name__ == "__main__":
    main()
