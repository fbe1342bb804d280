"""CTranslate2 as one side of a comparison; runs in an environment of its own, without our packages.

python side_ctranslate2.py convert FOLDER OUT int8
python side_ctranslate2.py serve OUT NUM_THREADS NUM_SEQUENCES NUM_TOKENS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
from answers import Generate, Report, file_bytes, run_side


def convert(source: str, target: str, form: str) -> None:
    converter = ctranslate2.converters.TransformersConverter(source, load_as_float16=False)
    converter.convert(target, quantization=form)


def start() -> tuple[dict[str, Any], Generate]:
    folder, num_threads = sys.argv[2], int(sys.argv[3])
    # It takes tokens by their texts alone.
    vocabulary: list[str] = json.loads((Path(folder) / "vocabulary.json").read_text())
    generator = ctranslate2.Generator(folder, "cpu", compute_type="auto", inter_threads=1, intra_threads=num_threads)

    def generate(prompts: Sequence[list[int]], num_tokens: int, report: Report) -> None:
        def step(result: ctranslate2.GenerationStepResult) -> bool:
            report(result.batch_id, result.token_id)
            return False

        generator.generate_batch(
            [[vocabulary[token_id] for token_id in prompt] for prompt in prompts],
            min_length=num_tokens,
            max_length=num_tokens,
            include_prompt_in_result=False,
            callback=step,
        )

    return {"read_bytes": file_bytes(f"{folder}/model.bin")}, generate


if __name__ == "__main__":
    run_side(convert, start)
