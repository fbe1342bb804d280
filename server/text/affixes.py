"""Tokens before and after a text that tokenizer_config.json asks for, and tokenizer.json does not say.

Llama's classes of `transformers` 4 replace the post-processor of tokenizer.json; all others leave it as it is.
R1-Distill-Qwen has such a class, and TGI and vLLM get its tokens from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from engine.link.errors import StartError
from engine.link.special_tokens import LLAMA_CLASSES


@dataclass(frozen=True, slots=True)
class Affixes:
    """The texts of the tokens before and after a text; None: there is none."""

    before: str | None
    after: str | None


def read_affixes(config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> Affixes | None:
    """The tokens that `config`, a tokenizer_config.json, asks for; None: those of tokenizer.json, if any, hold."""
    if config.get("tokenizer_class") not in LLAMA_CLASSES:
        return None
    return Affixes(
        special_tokens.get("bos_token") if config.get("add_bos_token", True) else None,
        special_tokens.get("eos_token") if config.get("add_eos_token") else None,
    )


def use_affixes(tokenizer: tokenizers.Tokenizer, affixes: Affixes) -> None:
    """Let `tokenizer` add these tokens, as far as it knows them, and no others. Raises StartError."""
    before, after = (
        [(text, token_id)] if text is not None and (token_id := tokenizer.token_to_id(text)) is not None else []
        for text in (affixes.before, affixes.after)
    )
    parts = [text for text, _ in before] + ["$A"] + [text for text, _ in after]
    try:
        tokenizer.post_processor = TemplateProcessing(
            single=parts, pair=[*parts, "$B:1"], special_tokens=before + after
        )
    except ValueError as error:
        raise StartError(
            f"the tokens before and after a text cannot be used ({error}): correct tokenizer_config.json"
        ) from error
