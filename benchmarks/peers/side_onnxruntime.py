"""onnxruntime-genai as one side of a comparison; runs in an environment of its own, without our packages.

python side_onnxruntime.py convert FOLDER OUT int8|int4
python side_onnxruntime.py serve OUT NUM_THREADS NUM_SEQUENCES NUM_TOKENS
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from answers import Generate, Report, file_bytes, run_side

OPTIONS = ["accuracy_level=4", "hf_token=false"]
"""Activations are quantized to int8, which is the fastest; nothing is asked of the Hub."""


def convert(source: str, target: str, form: str) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", form]
    with tempfile.TemporaryDirectory() as cache:
        command = [*builder, "-i", source, "-o", target, "-c", cache, "--extra_options", *OPTIONS]
        subprocess.run(command, check=True)


def start() -> tuple[dict[str, Any], Generate]:
    import numpy as np
    import onnxruntime_genai

    folder, num_threads, num_tokens = sys.argv[2], int(sys.argv[3]), int(sys.argv[5])
    config = onnxruntime_genai.Config(folder)
    threads = {"intra_op_num_threads": num_threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = onnxruntime_genai.Model(config)

    def generate(prompts: Sequence[list[int]], num_new: int, report: Report) -> None:
        length = len(prompts[0]) + num_new
        assert len(prompts) * length <= num_tokens
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, batch_size=len(prompts), min_length=length, max_length=length)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(num_new):
            generator.generate_next_token()
            for sequence, token_id in enumerate(generator.get_next_tokens()):
                report(sequence, int(token_id))

    return {"read_bytes": file_bytes(f"{folder}/model.onnx.data")}, generate


if __name__ == "__main__":
    run_side(convert, start)
