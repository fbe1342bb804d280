"""Keys of config.json that decoders spell alike: the checks and readings that families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.link.errors import StartError

MAX_TOKENS = 2**31 - 1
MAX_SIZES = {
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "max_position_embeddings": MAX_TOKENS,
    "num_attention_heads": 2**16,
    "num_hidden_layers": 2**16,
    "num_key_value_heads": 2**16,
    "vocab_size": 2**24,
}
"""Keys of sizes; a larger value is taken for damage and not for a size."""
MAX_HEAD_DIM = 2**16
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The numbers of a pre-norm decoder with rotary positions, for the whole model and not for one rank."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    is_tied: bool
    """Whether the table of embeddings is the output head, too."""
    has_qkv_bias: bool
    has_output_bias: bool = False
    """Whether the projection of what attention gives has a bias."""
    windows: list[int | None]
    """For each layer how many tokens a token sees, itself included; None: all up to itself."""


def complete_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the values that the family's class in `transformers` has for the keys that it lacks.

    A null means as many heads of keys and values as of queries. Raises StartError for a size that is none, and for
    another activation than Qwen's.
    """
    completed = {**defaults, **config}
    if completed.get("num_key_value_heads") is None:
        completed["num_key_value_heads"] = completed.get("num_attention_heads")
    check_sizes(completed)
    _check_activation(completed)
    return completed


def read_decoder_config(
    config: Mapping[str, Any], *, has_qkv_bias: bool, windows: list[int | None], has_output_bias: bool = False
) -> DecoderConfig:
    """Read a config.json that `check_sizes` has let through."""
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        norm_eps=config["rms_norm_eps"],
        is_tied=bool(config.get("tie_word_embeddings")),
        has_qkv_bias=has_qkv_bias,
        has_output_bias=has_output_bias,
        windows=windows,
    )


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raises StartError where a size is missing or is no size."""
    if lacking := [key for key in (*MAX_SIZES, "rms_norm_eps") if config.get(key) is None]:
        raise StartError(f"config.json does not say {', '.join(lacking)}: fetch the model again")
    max_sizes = {**MAX_SIZES, "head_dim": MAX_HEAD_DIM} if config.get("head_dim") is not None else MAX_SIZES
    for key, max_size in max_sizes.items():
        if not is_whole(config[key], 1, max_size):
            raise StartError(f"{key} {config[key]!r} in config.json is not a size: fetch the model again")
    eps = config["rms_norm_eps"]
    if not isinstance(eps, int | float) or not 0 < eps < 1:
        raise StartError(f"rms_norm_eps {eps!r} in config.json is not a number between 0 and 1: fetch the model again")


def _check_activation(config: Mapping[str, Any]) -> None:
    """Raises StartError unless the gated MLP has the activation that all Qwen have."""
    if config.get("hidden_act", "silu") != "silu":
        raise StartError(f"hidden_act {config['hidden_act']!r} in config.json is not supported; Qwen has silu")


def attention_windows(config: Mapping[str, Any]) -> list[int | None]:
    """For each layer how many tokens a token sees, itself included; None: all up to itself.

    An explicit `layer_types` decides; without it the layers from `max_window_layers` on have a window, with the
    defaults of transformers' Qwen2Config. Raises StartError.
    """
    num_layers = config["num_hidden_layers"]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    if window is not None and not is_whole(window, 1, MAX_TOKENS):
        raise StartError(f"sliding_window {window!r} in config.json is not a number of tokens: correct it or remove it")
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28) if window else num_layers
        if not is_whole(first, 0, MAX_TOKENS):
            raise StartError(f"max_window_layers {first!r} in config.json is not a number of layers: correct it")
        types = [FULL if index < first else SLIDING for index in range(num_layers)]
    is_list = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
    if not is_list or len(types) != num_layers:
        raise StartError(f"layer_types in config.json must say {FULL} or {SLIDING} for each of {num_layers} layers")
    if SLIDING in types and window is None:
        raise StartError(
            "layer_types in config.json has sliding layers: it must say use_sliding_window and sliding_window, too"
        )
    return [window if kind == SLIDING else None for kind in types]


def is_whole(value: Any, min_value: int, max_value: int) -> bool:
    """Whether `value` is a whole number of config.json within the bounds; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and min_value <= value <= max_value
