"""Qwen3: as Qwen2, but heads of queries and keys are normed, and there are no biases (Qwen3 technical report, 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.attention.base import AttentionBackend
from engine.layers.base import Rotation
from engine.layers.norm import HeadNorms
from engine.layers.rope import make_rotary
from engine.models.base import CheckpointLayers, ModelContext
from engine.models.blocks import Attention, DecoderForCausalLM
from engine.models.config import DecoderConfig, attention_windows, complete_config, read_decoder_config
from engine.models.qwen2 import DEFAULTS
from parallel.partition import HeadShard

DEFAULT_HEAD_DIM = 128
"""Features of a head where config.json does not say, whatever the hidden size is."""


class Qwen3Attention(Attention):
    """Attention whose queries and keys are normed before they are rotated."""

    def __init__(
        self, name: str, config: DecoderConfig, shards: Sequence[HeadShard], window: int | None, context: ModelContext
    ) -> None:
        super().__init__(name, config, shards, window, context)
        shard = shards[context.parallel.rank]
        heads = shard.num_heads, shard.num_kv_heads
        self._head_norms = HeadNorms(heads, config.head_dim, config.norm_eps, context.activation_dtype)

    def checkpoint_layers(self) -> CheckpointLayers:
        return {**super().checkpoint_layers(), "q_norm": (self._head_norms, 0), "k_norm": (self._head_norms, 1)}

    def position(self, qkv: torch.Tensor, rotation: Rotation, backend: AttentionBackend) -> Rotation | None:
        self._ops.norm_heads(qkv, self._head_norms.weight, self._head_norms.eps)
        return super().position(qkv, rotation, backend)


class Qwen3ForCausalLM(DecoderForCausalLM):
    """Implements `engine.models.base.CausalLM`."""

    attention_class = Qwen3Attention

    def __init__(self, config: Mapping[str, Any], context: ModelContext) -> None:
        config = complete_config(config, DEFAULTS)
        has_bias = bool(config.get("attention_bias"))
        decoder = read_decoder_config(
            {**config, "head_dim": config.get("head_dim") or DEFAULT_HEAD_DIM},
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
            windows=attention_windows(config),
        )
        super().__init__(decoder, make_rotary(config, decoder.head_dim, context.device), context)
