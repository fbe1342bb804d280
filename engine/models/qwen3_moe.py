"""Qwen3-30B-A3B and Qwen3-235B-A22B: Qwen3 with experts that a router chooses, and none that has all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.rope import make_rotary
from engine.models.base import ModelContext
from engine.models.config import SLIDING, attention_windows, complete_config, read_decoder_config
from engine.models.experts import SparseDecoderForCausalLM, read_expert_config
from engine.models.qwen3 import Qwen3Attention

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_local_experts": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
"""Values that `transformers` has for keys that config.json lacks. It calls `num_experts` so, too."""


class Qwen3MoeForCausalLM(SparseDecoderForCausalLM):
    """Implements `engine.models.base.CausalLM`."""

    attention_class = Qwen3Attention

    def __init__(self, config: Mapping[str, Any], context: ModelContext) -> None:
        config = complete_config(config, DEFAULTS)
        has_bias = bool(config.get("attention_bias"))
        windows = _windows(config)
        decoder = read_decoder_config(config, has_qkv_bias=has_bias, has_output_bias=has_bias, windows=windows)
        experts = read_expert_config(config, has_shared_expert=False, num_tensors=context.num_tensors)
        super().__init__(decoder, experts, make_rotary(config, decoder.head_dim, context.device), context)


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """A window that is used is every layer's."""
    types = [SLIDING] * config["num_hidden_layers"] if config.get("use_sliding_window") else None
    return attention_windows({**config, "layer_types": types})
