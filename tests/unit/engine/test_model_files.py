"""What a model folder says about the tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import StartError
from engine.model_files import read_eos_token_ids, read_model_config

TOKENIZER = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"5": {"content": "<|im_end|>"}, "6": {"content": "x"}}}


@pytest.mark.parametrize(
    ("generation", "tokenizer", "config", "expected"),
    [
        ({"eos_token_id": [1, 2]}, TOKENIZER, {"eos_token_id": 9}, [1, 2]),
        ({"eos_token_id": 1}, TOKENIZER, {"eos_token_id": 9}, [5]),
        ({"eos_token_id": 1}, {}, {"eos_token_id": 9}, [1]),
        ({}, TOKENIZER, {"eos_token_id": 9}, [5]),
        ({}, {**TOKENIZER, "eos_token": {"content": "x"}}, {"eos_token_id": 9}, [6]),
        ({}, {"eos_token": "unknown"}, {"eos_token_id": 9}, [9]),
        ({}, {}, {"eos_token_id": [8, 9]}, [8, 9]),
        ({}, {}, {"eos_token_id": 0}, [0]),
        ({}, {}, {}, []),
    ],
)
def test_eos_ids(
    tmp_path: Path, generation: dict[str, Any], tokenizer: dict[str, Any], config: dict[str, Any], expected: list[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert read_eos_token_ids(tmp_path, config) == expected


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="has no config.json: give --model-id a folder of a Hugging Face model"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StartError, match="config.json .*: fetch the model again"):
        read_model_config(tmp_path)
