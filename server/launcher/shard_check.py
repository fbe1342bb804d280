"""More shards than the model can be cut for are refused by its config.json, before any of their processes starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.link.errors import StartError
from engine.link.model_files import read_file
from parallel.partition import SplitError, split_features, split_heads, split_rows
from server.launcher.errors import LaunchError
from server.launcher.sharding import Sharding

MAX_NAMED_SIZE = 8
"""Largest number of shards that the sentence tries, to say what would fit."""


def check_model(model_path: str, sharding: Sharding) -> None:
    """Raise LaunchError if config.json has too few heads or features. What it leaves open is for the engine to say."""
    if sharding.size == 1:
        return
    try:
        config = json.loads(read_file(Path(model_path) / "config.json") or b"{}")
    except StartError as error:
        raise LaunchError(str(error)) from error
    except (ValueError, RecursionError):  # the engine says what is wrong
        return
    try:
        _split(config, sharding.size)
    except SplitError as error:
        fitting = [str(size) for size in range(1, min(sharding.size, MAX_NAMED_SIZE + 1)) if _can_split(config, size)]
        fix = f"start with --num-shard {' or '.join(fitting)}" if fitting else "correct config.json"
        raise LaunchError(f"the model can't be cut for {sharding.size} shards: {error}: {fix}") from error


def _split(config: Any, size: int) -> None:
    """Raise SplitError as the engine will, whatever the weights' form; say nothing where numbers are missing."""
    sizes: Mapping[str, Any] = config if isinstance(config, dict) else {}
    inner = "moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"
    names = "num_attention_heads num_key_value_heads".split() + [inner, "vocab_size"]
    values: list[Any] = [sizes.get(name) for name in names]
    if not all(type(value) is int and value > 0 for value in values):
        return
    num_heads, num_kv_heads, intermediate_size, vocab_size = values
    split_heads(num_heads, num_kv_heads, size)
    split_features(intermediate_size, size)
    split_rows(vocab_size, size)


def _can_split(config: Any, size: int) -> bool:
    try:
        _split(config, size)
    except SplitError:
        return False
    return True
