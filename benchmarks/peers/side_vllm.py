"""vLLM for CPUs as one side of a comparison; runs in an environment of its own, without our packages.

python side_vllm.py convert FOLDER OUT bfloat16|w8a8
python side_vllm.py serve OUT NUM_THREADS NUM_SEQUENCES NUM_TOKENS
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from answers import Generate, Report, run_side

W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""Weights in int8 per channel, activations in int8 per token, as llm-compressor writes them."""


def convert(source: str, target: str, form: str) -> None:
    """Copy a folder; for w8a8 round the matrices of its layers to int8."""
    shutil.copytree(source, target)
    if form == "bfloat16":
        return
    from safetensors.torch import load_file, save_file

    for file in Path(target).glob("*.safetensors"):
        save_file(rounded(load_file(file)), file, metadata={"format": "pt"})
    for index in Path(target).glob("*.safetensors.index.json"):
        index.unlink()  # It names no scales; without it every file is read.
    config = json.loads((Path(target) / "config.json").read_text())
    (Path(target) / "config.json").write_text(json.dumps({**config, "quantization_config": W8A8}))


def rounded(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors with the layers' matrices in int8, each with the scales of its outputs."""
    import torch

    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            weight = tensor.float()
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            result[name] = (weight / scale).round().to(torch.int8)
            result[f"{name}_scale"] = scale.to(tensor.dtype)
        else:
            result[name] = tensor
    return result


def start() -> tuple[dict[str, Any], Generate]:
    """Its engine in this process, one step after the other, without the prefix cache."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    folder, num_sequences, num_tokens = sys.argv[2], int(sys.argv[4]), int(sys.argv[5])
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=num_tokens,
            max_num_seqs=num_sequences,
            max_num_batched_tokens=num_tokens,
        )
    )

    def generate(prompts: Sequence[list[int]], num_new: int, report: Report) -> None:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=num_new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                for token_id in output.outputs[0].token_ids:
                    report(int(output.request_id), token_id)

    return {"read_bytes": None}, generate


if __name__ == "__main__":
    run_side(convert, start)
