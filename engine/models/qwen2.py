"""Qwen2 (Qwen1.5, Qwen2, Qwen2.5, Coder, Math, QwQ, R1-Distill-Qwen): pre-norm decoder, grouped-query attention with
biases on q, k and v, SwiGLU, rotary embedding (Qwen2 technical report, 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.attention.base import AttentionBackend, AttentionShape, LayerCache
from engine.layers.base import Rotation
from engine.layers.norm import RMSNorm
from engine.layers.rope import make_rotary
from engine.link.errors import StartError
from engine.models.base import Loadable, ModelContext
from parallel.embedding import VocabTable
from parallel.linear import ColumnParallelLinear, RowParallelLinear, input_units
from parallel.partition import HeadShard, lengths, scaled, split_features, split_heads, split_rows
from quant.base import LinearMethod

MOST_TOKENS = 2**31 - 1
SIZES = {
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "max_position_embeddings": MOST_TOKENS,
    "num_attention_heads": 2**16,
    "num_hidden_layers": 2**16,
    "num_key_value_heads": 2**16,
    "vocab_size": 2**24,
}
"""What config.json must say, and the most that is taken for a size and not for damage."""
FULL, SLIDING = "full_attention", "sliding_attention"


class Qwen2Layer:
    """One decoder layer; `residual` [num_tokens, hidden_size] is updated in place."""

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        shares: Sequence[HeadShard],
        shape: AttentionShape,
        window: int | None,
        context: ModelContext,
    ) -> None:
        self._ops = context.ops
        self._window = window
        self._num_rotated_heads = shape.num_heads + shape.num_kv_heads
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        heads = [scaled(share.heads, shape.head_dim) for share in shares]
        kv_heads = [scaled(share.kv_heads, shape.head_dim) for share in shares]

        quantization, rank = context.quantization, context.parallel.rank

        def method(module: str) -> LinearMethod:
            return quantization.method_for(f"{name}.{module}")

        def row_parallel(inputs: Sequence[slice], module: str) -> RowParallelLinear:
            is_rounding = quantization.is_rounding(context.device.type)
            return RowParallelLinear(inputs, hidden, method=method(module), is_gathered=is_rounding, **shared)

        shared: dict[str, Any] = {"kernels": quantization.run, "parallel": context.parallel}
        self.qkv_proj = ColumnParallelLinear(
            hidden,
            (heads[-1].stop, kv_heads[-1].stop, kv_heads[-1].stop),
            has_bias=True,
            methods=[method("self_attn.q_proj"), method("self_attn.k_proj"), method("self_attn.v_proj")],
            outputs=[heads[rank], kv_heads[rank], kv_heads[rank]],
            **shared,
        )
        self.o_proj = row_parallel(heads, "self_attn.o_proj")
        units = input_units(method("mlp.down_proj"), inner, hidden)
        inners = split_features(inner, context.parallel.size, units)
        self.gate_up_proj = ColumnParallelLinear(
            hidden,
            (inner, inner),
            has_bias=False,
            methods=[method("mlp.gate_proj"), method("mlp.up_proj")],
            outputs=[inners[rank], inners[rank]],
            **shared,
        )
        self.down_proj = row_parallel(inners, "mlp.down_proj")
        self.input_layernorm = RMSNorm(hidden, config["rms_norm_eps"], context.activation_dtype)
        self.post_attention_layernorm = RMSNorm(hidden, config["rms_norm_eps"], context.activation_dtype)

    def checkpoint_layers(self) -> dict[str, tuple[Loadable, int]]:
        return {
            "input_layernorm": (self.input_layernorm, 0),
            "self_attn.q_proj": (self.qkv_proj, 0),
            "self_attn.k_proj": (self.qkv_proj, 1),
            "self_attn.v_proj": (self.qkv_proj, 2),
            "self_attn.o_proj": (self.o_proj, 0),
            "post_attention_layernorm": (self.post_attention_layernorm, 0),
            "mlp.gate_proj": (self.gate_up_proj, 0),
            "mlp.up_proj": (self.gate_up_proj, 1),
            "mlp.down_proj": (self.down_proj, 0),
        }

    def __call__(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        rotation: Rotation,
        attention: AttentionBackend,
        cache: LayerCache,
        attn_metadata: Any,
    ) -> torch.Tensor:
        """x is the previous layer's output, not yet added to the residual; the result is this layer's, likewise."""
        norm = self.input_layernorm
        qkv = self.qkv_proj(self._ops.add_rms_norm(residual, x, norm.weight, norm.eps))
        self._ops.rotate(qkv, rotation, self._num_rotated_heads)
        x = self.o_proj(attention.forward(qkv, cache, attn_metadata, self._window))
        norm = self.post_attention_layernorm
        gate_up = self.gate_up_proj(self._ops.add_rms_norm(residual, x, norm.weight, norm.eps))
        return self.down_proj(self._ops.silu_and_mul(gate_up))


class Qwen2ForCausalLM:
    """Implements `engine.models.base.CausalLM`."""

    def __init__(self, config: Mapping[str, Any], context: ModelContext) -> None:
        _refuse_unsupported(config)
        self._context = context
        self.vocab_size: int = config["vocab_size"]
        self.num_layers: int = config["num_hidden_layers"]
        self.max_position_embeddings: int = config["max_position_embeddings"]
        num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
        parallel = context.parallel
        head_shards = split_heads(num_heads, num_kv_heads, parallel.size)
        own = head_shards[parallel.rank]
        self.attention_shape = AttentionShape(own.num_heads, own.num_kv_heads, head_dim)
        # residual, layer input and output, normed; qkv and attention's output; gate, up and their product
        per_inner = 3 * -(-config["intermediate_size"] // parallel.size)
        self.activations_per_token: int = (
            4 * config["hidden_size"] + (2 * own.num_heads + 2 * own.num_kv_heads) * head_dim + per_inner
        )
        self.rotary = make_rotary(config, head_dim, context.device)
        quantization, hidden = context.quantization, config["hidden_size"]
        self._is_tied = bool(config.get("tie_word_embeddings"))
        rows = split_rows(self.vocab_size, parallel.size)
        self._logits_widths = lengths(rows)
        self.embed_tokens = VocabTable(
            rows,
            hidden,
            quantization.dense,
            quantization.head if self._is_tied else None,
            quantization.run,
            parallel,
        )
        self.layers = [
            Qwen2Layer(f"model.layers.{index}", config, head_shards, self.attention_shape, window, context)
            for index, window in enumerate(attention_windows(config))
        ]
        self.norm = RMSNorm(hidden, config["rms_norm_eps"], context.activation_dtype)
        self.lm_head: VocabTable | ColumnParallelLinear = (
            self.embed_tokens
            if self._is_tied
            else ColumnParallelLinear(
                hidden,
                (self.vocab_size,),
                has_bias=False,
                methods=[quantization.head_method_for("lm_head")],
                outputs=[rows[parallel.rank]],
                kernels=quantization.run,
                parallel=parallel,
            )
        )

    def checkpoint_layers(self) -> dict[str, tuple[Loadable, int]]:
        found: dict[str, tuple[Loadable, int]] = {
            "model.embed_tokens": (self.embed_tokens, 0),
            "model.norm": (self.norm, 0),
        }
        if isinstance(self.lm_head, ColumnParallelLinear):
            found["lm_head"] = (self.lm_head, 0)
        for index, layer in enumerate(self.layers):
            found |= {f"model.layers.{index}.{name}": target for name, target in layer.checkpoint_layers().items()}
        return found

    def is_ignored(self, name: str) -> bool:
        """A copy of the tied table, and the rotary frequencies that old `transformers` versions stored."""
        return (self._is_tied and name == "lm_head.weight") or name.endswith(".rotary_emb.inv_freq")

    def use_attention(self, backend: AttentionBackend, caches: list[LayerCache]) -> None:
        self._attention = backend
        self._caches = caches

    def forward(self, input_ids: torch.Tensor, rotation: Rotation, attn_metadata: Any) -> torch.Tensor:
        residual = self.embed_tokens.embed(input_ids, self._context.activation_dtype)
        x = torch.zeros_like(residual)
        for layer, cache in zip(self.layers, self._caches, strict=True):
            x = layer(residual, x, rotation, self._attention, cache, attn_metadata)
        return residual.add_(x)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._context.ops.rms_norm(hidden, self.norm.weight, self.norm.eps)
        return self._context.parallel.gather(self.lm_head(normed).to(torch.float32), self._logits_widths)


def attention_windows(config: Mapping[str, Any]) -> list[int | None]:
    """For each layer how many tokens a token sees, itself included; None: all up to itself.

    By an explicit `layer_types`, or the layers from `max_window_layers` on, with the defaults of transformers'
    Qwen2Config. Raises StartError.
    """
    num_layers = config["num_hidden_layers"]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    if window is not None and not _is_whole(window, 1, MOST_TOKENS):
        raise StartError(f"sliding_window {window!r} in config.json is not a number of tokens: correct it or remove it")
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28) if window else num_layers
        if not _is_whole(first, 0, MOST_TOKENS):
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


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if lacking := [key for key in (*SIZES, "rms_norm_eps") if config.get(key) is None]:
        raise StartError(f"config.json does not say {', '.join(lacking)}: fetch the model again")
    sizes = {**SIZES, "head_dim": 2**16} if config.get("head_dim") is not None else SIZES
    for key, most in sizes.items():
        if not _is_whole(config[key], 1, most):
            raise StartError(f"{key} {config[key]!r} in config.json is not a size: fetch the model again")
    eps = config["rms_norm_eps"]
    if not isinstance(eps, int | float) or not 0 < eps < 1:
        raise StartError(f"rms_norm_eps {eps!r} in config.json is not a number between 0 and 1: fetch the model again")
    if config.get("hidden_act", "silu") != "silu":
        raise StartError(f"hidden_act {config['hidden_act']!r} in config.json is not supported; Qwen2 has silu")
