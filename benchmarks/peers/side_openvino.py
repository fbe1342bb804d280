"""OpenVINO GenAI as one side of a comparison; runs in an environment of its own, without our packages.

    python side_openvino.py convert FOLDER OUT fp16|int8|int4
    python side_openvino.py serve OUT NUM_THREADS NUM_SEQUENCES NUM_TOKENS

The pipeline for continuous batches is what OpenVINO's own LLMPipeline and its server run on such a CPU, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from answers import Generate, Report, file_bytes, run_side

INT4 = {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0}
BLOCK_TOKENS = 32
"""Tokens of a KV block on a CPU."""


def convert(source: str, target: str, form: str) -> None:
    """Export as `optimum-cli export openvino --weight-format` does."""
    import openvino_tokenizers
    from openvino import save_model
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"fp16": None, "int8": {"bits": 8, "sym": False}, "int4": INT4}
    quantization = OVWeightQuantizationConfig(**options[form]) if options[form] else None
    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, load_in_8bit=False, quantization_config=quantization
    )
    model.save_pretrained(target)
    both = openvino_tokenizers.convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
    for name, part in zip(("tokenizer", "detokenizer"), both, strict=True):
        save_model(part, f"{target}/openvino_{name}.xml")


class OpenVino:
    """A pipeline tuned for latency, in one stream."""

    def __init__(self, folder: str, num_threads: int, num_sequences: int, num_tokens: int) -> None:
        import openvino_genai

        self._library = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = num_tokens
        scheduler.max_num_seqs = num_sequences
        scheduler.num_kv_blocks = -(-num_tokens // BLOCK_TOKENS) + num_sequences
        hints = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": num_threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", hints)

    def generate(self, prompts: Sequence[list[int]], num_tokens: int, report: Report) -> None:
        import numpy as np
        from openvino import Tensor

        config = self._library.GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, ignore_eos=True, do_sample=False
        )
        handles = [
            self._pipeline.add_request(index, Tensor(np.array([prompt], dtype=np.int64)), config)
            for index, prompt in enumerate(prompts)
        ]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for index, handle in enumerate(handles):
                for output in handle.read().values() if handle.can_read() else ():
                    for token_id in output.generated_ids:
                        report(index, token_id)


def start() -> tuple[dict[str, Any], Generate]:
    folder, sizes = sys.argv[2], map(int, sys.argv[3:])
    return {"read_bytes": file_bytes(f"{folder}/openvino_model.bin")}, OpenVino(folder, *sizes).generate


if __name__ == "__main__":
    run_side(convert, start)
