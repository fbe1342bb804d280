"""Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2 with experts that a router chooses and one that has all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.rope import make_rotary
from engine.models.base import ModelContext
from engine.models.config import FULL, SLIDING, attention_windows, complete_config, read_decoder_config
from engine.models.experts import SparseDecoderForCausalLM, read_expert_config

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
"""Values that `transformers` has for keys that config.json lacks."""


class Qwen2MoeForCausalLM(SparseDecoderForCausalLM):
    """Implements `engine.models.base.CausalLM`."""

    def __init__(self, config: Mapping[str, Any], context: ModelContext) -> None:
        config = complete_config(config, DEFAULTS)
        has_bias = bool(config.get("qkv_bias", True))
        decoder = read_decoder_config(config, has_qkv_bias=has_bias, windows=_windows(config))
        experts = read_expert_config(config, has_shared_expert=True, num_tensors=context.num_tensors)
        super().__init__(decoder, experts, make_rotary(config, decoder.head_dim, context.device), context)


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """As Qwen2's, but without `layer_types` every second layer below `max_window_layers` has a window."""
    types = config.get("layer_types")
    if types is None and config.get("use_sliding_window"):
        end = config.get("max_window_layers", 28)
        types = [SLIDING if index % 2 == 0 and index < end else FULL for index in range(config["num_hidden_layers"])]
    return attention_windows({**config, "layer_types": types})
