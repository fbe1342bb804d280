"""GPTQ (formats gptq and gptq_v2) and AWQ checkpoints by gptqmodel 7.7.0.

    python3.11 -m venv gptqmodel
    gptqmodel/bin/pip install torch==2.13.0 transformers==5.23.0 setuptools wheel accelerate numpy safetensors \
        filelock threadpoolctl packaging protobuf pillow requests pypcre tokenicer logbar jinja2 ninja maturin \
        datasets pyarrow dill torchao defuser device-smi
    gptqmodel/bin/pip install --no-deps --no-build-isolation gptqmodel==7.7.0
    PYTHONPATH=tests OMP_NUM_THREADS=1 gptqmodel/bin/python tests/oracles/quant_gptqmodel.py [CASE...]

(--no-deps: it declares torch>=2.14.1, and runs with 2.13.) Needs a C++ compiler: it builds its packer on first use.
Beside each checkpoint it is noted how far gptqmodel's own dequantisation of the stored folder is from dequantize.py
rounded to float16, under each reading of zero points. An error in its AWQ ends the process: run such cases one by one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, get_args

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # read on import; it dies on two cores without

import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # noqa: E402
from gptqmodel.looper.awq_processor import AWQProcessor  # noqa: E402
from gptqmodel.nn_modules.qlinear import BaseQuantLinear  # noqa: E402
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm  # noqa: E402
from oracles.dequantize import Zeros, dequantize  # noqa: E402
from oracles.quant_source import Case, calibration_ids, write_cases  # noqa: E402
from oracles.quant_stored import work_folder  # noqa: E402

V1, V2 = {"method": "gptq", "format": "gptq"}, {"method": "gptq", "format": "gptq_v2"}
AWQ = {"method": "awq", "format": "gemm"}
NO_CLIP = {"apply_clip": False}
"""Not an option of the tool but an attribute: its search for clips wants outputs in multiples of 64, k_proj has 32."""
SKIPS = {"-:.*o_proj": {}}
MIXED = {"-:.*layers.0.mlp.up_proj": {}, "+:.*layers.1.mlp.down_proj": {"bits": 8, "group_size": 64}}
HEAD_4BIT = {"lm_head": True, "dynamic": {"lm_head": {"bits": 4}}}  # its default is 8 bits, whatever the others
CHANNEL = {"act_group_aware": False}  # its default wants groups
F16, BF16 = torch.float16, torch.bfloat16

CASES = [
    Case(
        name=name,
        source=source,
        dtype=dtype,
        options={**base, "bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act, **more},
    )
    for name, source, dtype, base, bits, group_size, sym, desc_act, more in (
        ("v1-4bit-g32-asym-act", "small", BF16, V1, 4, 32, False, True, {}),
        ("v2-4bit-g32-asym-act", "small", BF16, V2, 4, 32, False, True, {}),
        ("v1-4bit-g128", "base", BF16, V1, 4, 128, True, False, {}),
        ("v1-4bit-g32-zeros", "zeros", BF16, V1, 4, 32, False, False, {}),
        ("v2-4bit-g32-zeros", "zeros", BF16, V2, 4, 32, False, False, {}),
        ("v1-3bit-g32-zeros", "zeros", BF16, V1, 3, 32, False, False, {}),
        ("v2-3bit-g32-act", "small", BF16, V2, 3, 32, True, True, {}),
        ("v1-2bit-g32-zeros-act", "zeros", F16, V1, 2, 32, False, True, {}),
        ("v2-2bit-channel", "small", BF16, V2, 2, -1, True, False, CHANNEL),
        ("v1-8bit-channel", "small", BF16, V1, 8, -1, True, False, CHANNEL),
        ("v1-8bit-g32-zeros", "zeros", BF16, V1, 8, 32, False, False, {}),
        ("v2-8bit-g64-asym-act", "small", F16, V2, 8, 64, False, True, {}),
        ("v2-4bit-channel-asym", "small", F16, V2, 4, -1, False, False, CHANNEL),
        ("v1-4bit-g128-ragged", "ragged", BF16, V1, 4, 128, True, False, {}),
        ("v1-4bit-g32-static", "small", BF16, V1, 4, 32, True, True, {"static_groups": True}),
        ("v1-lm-head", "untied", BF16, V1, 4, 32, True, False, {"lm_head": True}),
        ("v1-lm-head-4bit", "untied", BF16, V1, 4, 32, True, True, HEAD_4BIT),
        ("v1-lm-head-tied", "base", BF16, V1, 4, 128, True, False, {"lm_head": True}),
        ("v1-skips", "small", BF16, V1, 4, 32, True, False, {"dynamic": SKIPS}),
        ("v2-mixed", "small", BF16, V2, 4, 32, False, False, {"dynamic": MIXED}),
        ("awq-g32", "small", BF16, AWQ, 4, 32, False, False, NO_CLIP),
        ("awq-g32-symmetric", "small", BF16, AWQ, 4, 32, True, False, NO_CLIP),
        ("awq-g128", "base", F16, AWQ, 4, 128, False, False, {}),
        ("awq-g32-zeros", "zeros", BF16, AWQ, 4, 32, False, False, NO_CLIP),
        ("awq-channel", "small", BF16, AWQ, 4, -1, False, False, NO_CLIP),
        ("awq-skips", "small", BF16, AWQ, 4, 32, False, False, {"dynamic": SKIPS, **NO_CLIP}),
        ("awq-lm-head", "untied", BF16, AWQ, 4, 32, False, False, {"lm_head": True, **NO_CLIP}),
    )
]


def quantize(case: Case, source: Path, target: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    options = dict(case.options)
    is_clipping = options.pop("apply_clip", True)
    AWQProcessor.apply_clip = property(lambda _: is_clipping, lambda *_: None)
    config = QuantizeConfig(**options, offload_to_disk=False)
    model = GPTQModel.load(str(source), config, dtype=case.dtype, device="cpu")
    rows = calibration_ids()
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows], batch_size=1)
    model.save(str(target))
    try:
        return check(target)
    except Exception as error:  # the files count, whether or not the tool reads them back on a CPU
        return {"tool_forward": f"fails: {type(error).__name__}: {str(error)[:300]}"}


@torch.inference_mode()
def check(folder: Path) -> dict[str, Any]:
    """In float16, as the scales of GPTQ are stored; in bfloat16 the tool would round them first."""
    loaded = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    own = {
        name: own_weight(module) for name, module in loaded.model.named_modules() if isinstance(module, BaseQuantLinear)
    }
    differences = {}
    for zeros in get_args(Zeros):
        weights = dequantize(folder, zeros=zeros)
        differences[zeros] = max(
            float((torch.from_numpy(weights[f"{name}.weight"]).to(weight.dtype).float() - weight.float()).abs().max())
            for name, weight in own.items()
        )
    dtypes = "/".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in own.values()}))
    return {"tool_forward": f"own dequantisation of {len(own)} linears ({dtypes})", "tool_difference": differences}


def own_weight(module: Any) -> torch.Tensor:
    if hasattr(module, "dequantize_weight") and "awq" not in type(module).__module__:
        weight: torch.Tensor = module.dequantize_weight().T
    else:
        weight = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size).T
    return weight


def main() -> None:
    os.chdir(work_folder())  # it leaves a folder `logs` where it runs
    write_cases(CASES, sys.argv[1:], "gptqmodel", ("gptqmodel", "transformers", "torch"), quantize)


if __name__ == "__main__":
    main()
