"""Special tokens that a tokenizer has although its folder does not name them: those of its class in `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LLAMA_CLASSES = frozenset({"LlamaTokenizer", "LlamaTokenizerFast"})
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
END_OF_TEXT = "<|endoftext|>"
QWEN_TOKENS = {"eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
"""What Qwen2Tokenizer has. A folder of a Qwen model gets that class whatever else it names, but for Llama's."""


def default_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts by name for a folder whose tokenizer_config.json is `config`. They count where no file has the name.

    A null in a file is an answer: the tokenizer has no such token.
    """
    return dict(LLAMA_TOKENS if config.get("tokenizer_class") in LLAMA_CLASSES else QWEN_TOKENS)
