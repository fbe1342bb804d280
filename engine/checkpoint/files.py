"""The JSON files of a model's folder: config.json, the quantisation, the end-of-sequence ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.link.errors import StartError
from engine.link.model_files import read_file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file. Raises StartError when it can't be read."""
    text = read_file(path)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StartError(f"{path} cannot be read ({error}): fetch the model again") from error
    if not isinstance(content, dict):
        raise StartError(f"{path} is not a JSON object: fetch the model again")
    return content


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


def read_eos_token_ids(folder: Path, config: dict[str, Any]) -> list[int]:
    """The ids that end a text.

    A list in generation_config.json counts; a single number there gives way to the tokenizer's eos token, and
    config.json comes last.
    """
    path = folder / "generation_config.json"
    generation = read_json(path).get("eos_token_id")
    if isinstance(generation, list):
        return _ids(generation, path)
    for candidate in (_tokenizer_eos_id(folder / "tokenizer_config.json"), generation):
        if isinstance(candidate, int):
            return [candidate]
    model_ids = config.get("eos_token_id")
    if model_ids is None:
        return []
    return _ids(model_ids if isinstance(model_ids, list) else [model_ids], folder / "config.json")


def _ids(values: list[Any], path: Path) -> list[int]:
    if not all(isinstance(value, int) for value in values):
        raise StartError(f"eos_token_id in {path} is {values!r}, not token ids: fetch the model again")
    return values


def _tokenizer_eos_id(path: Path) -> int | None:
    tokenizer_config = read_json(path)
    eos = tokenizer_config.get("eos_token")
    content = eos.get("content") if isinstance(eos, dict) else eos
    if content is None:
        return None
    try:
        decoder = (tokenizer_config.get("added_tokens_decoder") or {}).items()
        return next((int(token_id) for token_id, token in decoder if token.get("content") == content), None)
    except (AttributeError, ValueError) as error:
        raise StartError(f"added_tokens_decoder in {path} cannot be used ({error}): fetch the model again") from error
