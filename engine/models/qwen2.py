"""Qwen2 (Qwen1.5, Qwen2, Qwen2.5, Coder, Math, QwQ, R1-Distill-Qwen): pre-norm decoder, grouped-query attention with
biases on q, k and v, SwiGLU, rotary embedding (Qwen2 technical report, 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.rope import make_rotary
from engine.models.base import ModelContext
from engine.models.blocks import DecoderForCausalLM
from engine.models.config import attention_windows, complete_config, read_decoder_config

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
"""Values that `transformers` has for keys that config.json lacks."""


class Qwen2ForCausalLM(DecoderForCausalLM):
    """Implements `engine.models.base.CausalLM`."""

    def __init__(self, config: Mapping[str, Any], context: ModelContext) -> None:
        config = complete_config(config, DEFAULTS)
        decoder = read_decoder_config(config, has_qkv_bias=True, windows=attention_windows(config))
        super().__init__(decoder, make_rotary(config, decoder.head_dim, context.device), context)
