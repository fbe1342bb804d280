"""AWQ checkpoints by AutoAWQ 0.2.9, with the one-line fix that makes its search valid on a CPU.

    python3.11 -m venv autoawq
    autoawq/bin/pip install torch==2.13.0 transformers==4.51.3 accelerate datasets zstandard
    autoawq/bin/pip install --no-deps --no-build-isolation autoawq==0.2.9
    PYTHONPATH=tests OMP_NUM_THREADS=1 autoawq/bin/python tests/oracles/quant_autoawq.py [CASE...]

(--no-deps: it declares triton, which a CPU doesn't need.) Its scale search keeps `v.cpu()` of every weight as the way
back, which on a CPU is the weight itself; here the search is handed clones. On a GPU nothing would differ. Beside each
checkpoint it is noted how far AutoAWQ's own dequantisation (float16) is from dequantize.py rounded to float16.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear import WQLinear_GEMM
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm
from oracles.dequantize import dequantize
from oracles.quant_source import Case, calibration_ids, write_cases

GEMM = {"zero_point": True, "w_bit": 4, "version": "GEMM"}
CASES = [
    Case(name=name, source=source, options={**GEMM, "q_group_size": group_size, **more})
    for name, source, group_size, more in (
        ("g128", "base", 128, {}),
        ("g32-odd", "odd", 32, {"apply_clip": False}),
        ("g32-zeros", "zeros", 32, {"apply_clip": False}),
        ("g64-ragged", "ragged", 64, {}),
        ("g32-skips-o-proj", "small", 32, {"apply_clip": False, "modules_to_not_convert": ["o_proj"]}),
        ("g32-skips-k-and-v", "small", 32, {"apply_clip": False, "modules_to_not_convert": ["k_proj", "v_proj"]}),
        ("g32-skips-layer", "small", 32, {"apply_clip": False, "modules_to_not_convert": ["layers.1."]}),
        ("g32-skips-down-proj", "small", 32, {"apply_clip": False, "modules_to_not_convert": ["down_proj"]}),
        ("channel", "small", -1, {"apply_clip": False}),
        ("g32-symmetric", "small", 32, {"apply_clip": False, "zero_point": False}),
        ("8bit", "small", 32, {"apply_clip": False, "w_bit": 8}),
    )
]
"""`apply_clip` off where k_proj has 32 outputs: the search for clips wants a multiple of 64. The format is the same."""


class CpuQuantizer(AwqQuantizer):
    """What the search restores after each try is a copy, not the very tensors it changed."""

    def _compute_best_scale(
        self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any, **named: Any
    ) -> Any:
        own = module2inspect.state_dict
        module2inspect.state_dict = lambda: {name: tensor.clone() for name, tensor in own().items()}
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest, **named)
        finally:
            del module2inspect.state_dict


def quantize(case: Case, source: Path, target: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = AutoAWQForCausalLM.from_pretrained(str(source), torch_dtype=case.dtype, device_map="cpu")
    model.quantize(
        None,
        quant_config={key: value for key, value in case.options.items() if key != "apply_clip"},
        apply_clip=case.options.get("apply_clip", True),
        calib_data=calibration_ids(),
        max_calib_seq_len=64,
        quantizer_cls=CpuQuantizer,
    )
    model.save_quantized(str(target))
    return check(model.model, target)


@torch.inference_mode()
def check(model: Any, folder: Path) -> dict[str, Any]:
    weights = dequantize(folder)
    difference = 0.0
    for name, module in model.named_modules():
        if isinstance(module, WQLinear_GEMM):
            own = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.w_bit, module.group_size)
            ours = torch.from_numpy(weights[f"{name}.weight"]).half()
            difference = max(difference, float((own.T.float() - ours.float()).abs().max()))
    return {"tool_forward": "dequantize_gemm (float16)", "tool_difference": difference}


def main() -> None:
    write_cases(CASES, sys.argv[1:], "autoawq", ("autoawq", "transformers", "torch"), quantize)


if __name__ == "__main__":
    main()
