"""Special tokens that a folder leaves out are those of `transformers`: in templates, and where texts end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizerFast

from engine.checkpoint.files import read_eos_token_ids
from server.text.chat_format import read_chat_format
from tests.tiny_model import write_tiny_qwen2

CLASSES = [
    None,
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "PreTrainedTokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
]
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
CONFIGS: list[dict[str, Any]] = [
    {},
    {"eos_token": "<|im_end|>"},
    {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}},
    {"bos_token": "<|im_start|>", "pad_token": None},
    {"eos_token": None},
    {"unk_token": None, "bos_token": None},
    dict.fromkeys(NAMES),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_qwen2(folder)
    return folder


@pytest.mark.parametrize("tokenizer_class", CLASSES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tokens_that_are_left_out_are_those_of_the_class(
    model: Path, tokenizer_class: str | None, config: dict[str, Any]
) -> None:
    named = config if tokenizer_class is None else {**config, "tokenizer_class": tokenizer_class}
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    is_llama = str(tokenizer_class).startswith("Llama")
    oracle = (LlamaTokenizerFast if is_llama else AutoTokenizer).from_pretrained(model)
    tokens = {name: token for name in NAMES if (token := getattr(oracle, name)) is not None}
    assert read_chat_format(model, named).special_tokens == tokens
    generation: dict[str, Any] = {"eos_token_id": []}
    (model / "generation_config.json").write_text(json.dumps(generation))
    known = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in known}
    assert read_eos_token_ids(model, {}) == [ids[token] for token in [tokens.get("eos_token")] if token in ids]
