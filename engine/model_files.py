"""What a model folder says about itself: config.json, end-of-sequence ids, the safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import StartError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file. Raises StartError when it can't be read."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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


def read_eos_token_ids(folder: Path, config: dict[str, Any]) -> list[int]:
    """The ids that end a text (reference `tgi-http.md` 4.4).

    A list in generation_config.json counts; a single number there gives way to the tokenizer's own eos token.
    """
    generation = read_json(folder / "generation_config.json").get("eos_token_id")
    if isinstance(generation, list):
        return [int(token_id) for token_id in generation]
    tokenizer = _tokenizer_eos_id(read_json(folder / "tokenizer_config.json"))
    for candidate in (tokenizer, generation, config.get("eos_token_id")):
        if isinstance(candidate, int):
            return [candidate]
        if isinstance(candidate, list):
            return [int(token_id) for token_id in candidate]
    return []


def _tokenizer_eos_id(tokenizer_config: dict[str, Any]) -> int | None:
    eos = tokenizer_config.get("eos_token")
    content = eos.get("content") if isinstance(eos, dict) else eos
    for token_id, token in tokenizer_config.get("added_tokens_decoder", {}).items():
        if content is not None and token.get("content") == content:
            return int(token_id)
    return None


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files, in order. Raises StartError when there are none or one that the index names is missing."""
    index = read_json(folder / "model.safetensors.index.json")
    if index:
        if not isinstance(index.get("weight_map"), dict):
            raise StartError(f"{folder}/model.safetensors.index.json has no weight_map: fetch the model again")
        paths = [folder / name for name in sorted(set(index["weight_map"].values()))]
        for path in paths:
            if not path.is_file():
                raise StartError(f"{path} is named by model.safetensors.index.json but missing: fetch the model again")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise StartError(f"{folder} has no *.safetensors file: only safetensors weights are loaded")
    return paths
