"""The tokenizer in a GGUF file's metadata -> tokenizer.json and tokenizer_config.json.

`transformers` can read such metadata, too. Its reader leaves out Qwen2's normalization, and takes the padding rows of
the table of embeddings for tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.link.errors import StartError

logger = logging.getLogger(__name__)

NORMAL_TOKEN, CONTROL_TOKEN, USER_TOKEN = 1, 3, 4
"""GGUF's token types: in the merges' vocabulary; added and special; added and merely matched whole."""
PLAIN_TOKENS = frozenset("<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>".split())
"""Tokens that llama.cpp's converter calls special by their looks, and Qwen's own tokenizer does not."""
MERGES, MODEL, SCHEME = "tokenizer.ggml.merges", "tokenizer.ggml.model", "tokenizer.ggml.pre"
BPE = "gpt2"
"""GGUF's name of byte-level BPE."""
UNNAMED = ("qwen2", "qwen2moe")
"""Architectures of which there are files from before May 2024, when llama.cpp's converter did not write `SCHEME`."""
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_as_qwen2(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    _split_words(tokenizer)


def _split_words(tokenizer: Tokenizer) -> None:
    first = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    second = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, second])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)


SCHEMES: dict[str, Callable[[Tokenizer], None]] = {"qwen2": _split_as_qwen2, "deepseek-r1-qwen": _split_words}
"""What happens to text before the merges. A file only names it, and llama.cpp knows it by that name."""


def name_scheme(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata with the scheme that an old file means and does not name."""
    is_bpe = metadata.get(MODEL) == BPE and metadata["general.architecture"] in UNNAMED
    if SCHEME in metadata or not is_bpe:
        return metadata
    logger.warning(
        "The GGUF file is from before May 2024 and does not say how text is split (%s): it is split as Qwen2 does",
        SCHEME,
    )
    return {**metadata, SCHEME: "qwen2"}


def added_tokens(metadata: Mapping[str, Any], plain_tokens: frozenset[str] = PLAIN_TOKENS) -> dict[int, dict[str, Any]]:
    """Each added token by id, as both tokenizer files spell it. `plain_tokens` are never special."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    types = metadata["tokenizer.ggml.token_type"]
    return {
        token_id: {"content": token, **flags, "special": kind == CONTROL_TOKEN and token not in plain_tokens}
        for token_id, (token, kind) in enumerate(zip(metadata["tokenizer.ggml.tokens"], types, strict=True))
        if kind in (CONTROL_TOKEN, USER_TOKEN)
    }


def refuse_other_tokenizers(metadata: Mapping[str, Any]) -> None:
    """Raise StartError for a tokenizer of another kind, or none: nothing else is known to be there then."""
    model, scheme = metadata.get(MODEL), metadata.get(SCHEME)
    if model != BPE or scheme not in SCHEMES:
        raise StartError(
            f"the GGUF file has a tokenizer of the kind {model!r}, {scheme!r}; only {BPE!r} with {', '.join(SCHEMES)} "
            "can be read: give a folder with safetensors weights"
        )


def build_tokenizer(
    metadata: Mapping[str, Any],
    added: Mapping[int, dict[str, Any]],
    schemes: Mapping[str, Callable[[Tokenizer], None]] = SCHEMES,
) -> Tokenizer:
    """The tokenizer from the file's own lists, whose kind is known to be right. Raises StartError for other merges."""
    kinds, tokens = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.tokens"]
    # Added tokens past the end of the vocabulary get their ids from add_tokens; those at its start belong to it.
    size = 1 + max(token_id for token_id, kind in enumerate(kinds) if kind == NORMAL_TOKEN)
    vocab = {token: token_id for token_id, token in enumerate(tokens[:size])}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in metadata.get(MERGES, ()))]
    for left, right in merges:
        if not {left, right, left + right} <= vocab.keys():  # the library would panic
            raise StartError(f"the GGUF file merges {left!r} and {right!r}, which are no tokens of it: fetch it again")
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    schemes[metadata[SCHEME]](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(**fields) for fields in added.values()])
    for token_id, fields in added.items():
        if tokenizer.token_to_id(fields["content"]) != token_id:
            raise StartError(f"the GGUF file's token {token_id}, {fields['content']!r}, is there twice: fetch it again")
    if metadata.get("tokenizer.ggml.add_bos_token"):
        _begin_with(tokenizer, metadata["tokenizer.ggml.bos_token_id"])
    return tokenizer


def _begin_with(tokenizer: Tokenizer, token_id: int) -> None:
    """Let every text begin with a token."""
    token = tokenizer.id_to_token(token_id)
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )
    tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])


def tokenizer_config(metadata: Mapping[str, Any], added: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """tokenizer_config.json, the chat templates included."""
    tokens = metadata["tokenizer.ggml.tokens"]

    def token(name: str) -> str | None:
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if token_id is None else str(tokens[token_id])

    pad, has_bos = token("padding"), bool(metadata.get("tokenizer.ggml.add_bos_token"))
    return {
        "add_bos_token": has_bos,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token_id): fields for token_id, fields in added.items()},
        "additional_special_tokens": [f["content"] for f in added.values() if f["special"] and f["content"] != pad],
        "bos_token": token("bos") if has_bos else None,
        "chat_template": metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "errors": "replace",
        "model_max_length": metadata["context_length"],
        "pad_token": pad,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer" if metadata[SCHEME] == "qwen2" else "PreTrainedTokenizerFast",
        "unk_token": None,
    }
