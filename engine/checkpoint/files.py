"""The JSON files of a model's folder: config.json, the quantisation, the end-of-sequence ids."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.link.errors import StartError
from engine.link.model_files import read_json
from engine.link.special_tokens import default_tokens


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises StartError when it is missing."""
    config = read_json(folder / "config.json")
    if not config:
        raise StartError(f"{folder} has no config.json: give --model-id a folder of a Hugging Face model")
    return config


def read_quantization_config(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint's description of its quantisation, from whichever file has it; None for a dense checkpoint.

    Raises StartError where it is no JSON object.
    """
    for key in ("quantization_config", "compression_config"):
        if isinstance(config.get(key), dict):
            return dict(config[key])
        if config.get(key) is not None:
            raise StartError(f"{key} in {folder / 'config.json'} is not a JSON object: fetch the model again")
    return read_json(folder / "quantize_config.json") or read_json(folder / "quant_config.json") or None


def read_eos_token_ids(folder: Path, config: dict[str, Any], *, is_strict: bool = False) -> list[int]:
    """The ids that end a text: all that generation_config.json, the tokenizer and config.json name.

    With `is_strict` they are TGI's: a list in generation_config.json counts alone; a single number there gives way to
    the tokenizer's eos token, and config.json comes last.
    """
    path = folder / "generation_config.json"
    generation = read_json(path).get("eos_token_id")
    of_generation, of_model = _ids(generation, path), _ids(config.get("eos_token_id"), folder / "config.json")
    of_tokenizer = _tokenizer_eos_ids(folder, has_default=not is_strict)
    if not is_strict:
        return list(dict.fromkeys([*of_generation, *of_tokenizer, *of_model]))
    if isinstance(generation, list):
        return of_generation
    return of_tokenizer or of_generation or of_model


def _ids(value: Any, path: Path) -> list[int]:
    """The ids of a number, a list of numbers, or None."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise StartError(f"eos_token_id in {path} is {value!r}, not token ids: fetch the model again")
    return values


def _tokenizer_eos_ids(folder: Path, *, has_default: bool) -> list[int]:
    """The id of the tokenizer's eos token, if there is one. `has_default`: its class has one that no file names."""
    path = folder / "tokenizer_config.json"
    tokenizer_config, token_map = read_json(path), read_json(folder / "special_tokens_map.json")
    eos = tokenizer_config.get("eos_token") or token_map.get("eos_token")
    if has_default and "eos_token" not in tokenizer_config and "eos_token" not in token_map:
        eos = default_tokens(tokenizer_config).get("eos_token")
    content = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(content, str):
        return []
    try:
        decoder = (tokenizer_config.get("added_tokens_decoder") or {}).items()
        known = [int(token_id) for token_id, token in decoder if token.get("content") == content]
    except (AttributeError, ValueError) as error:
        raise StartError(f"added_tokens_decoder in {path} cannot be used ({error}): fetch the model again") from error
    return known[:1] or _ids_of_text(content, folder / "tokenizer.json")


def _ids_of_text(content: str, path: Path) -> list[int]:
    """The id of a token of tokenizer.json. Newer programs write no `added_tokens_decoder`."""
    token_id = _vocabulary(path).get(content)
    return [token_id] if isinstance(token_id, int) else []


def count_tokens(folder: Path) -> int:
    """One more than the largest id in tokenizer.json, 0 where there is none. Raises StartError."""
    ids = _vocabulary(folder / "tokenizer.json").values()
    return 1 + max((token_id for token_id in ids if isinstance(token_id, int)), default=-1)


def _vocabulary(path: Path) -> Mapping[str, Any]:
    """The tokens of tokenizer.json and what it says to be their ids; added tokens count first. Raises StartError."""
    tokenizer = read_json(path)
    try:
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        return ChainMap(added, vocabulary if isinstance(vocabulary, dict) else {})
    except (AttributeError, KeyError, TypeError) as error:
        raise StartError(f"the tokens in {path} cannot be used ({error!r}): fetch the model again") from error
