"""A Qwen2 layer cut where its matrices get their inputs, for calibration: plain torch in float32, whole samples.

The engine's layer fuses matrices and attends over a cache in blocks. Here every matrix stands alone and may change
while the layer runs. `tests/contract/test_calibration.py` compares it with `transformers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from engine.attention.base import AttentionShape
from engine.layers.base import Rotation
from engine.layers.rope import Rotary
from engine.layers.torch import TorchOps
from engine.models.config import attention_windows, complete_config
from engine.models.qwen2 import DEFAULTS
from engine.quantize.stages import LayerTensors, OnInputs

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)
TOKENS_AT_A_TIME = 2048


class Qwen2Stages:
    """Implements `engine.quantize.stages.LayerStages`."""

    EMBEDDING = "model.embed_tokens.weight"
    LAYERS = "model.layers"
    MATRICES = (QKV, OUT, GATE_UP, DOWN)
    SOURCES = {
        QKV: "input_layernorm",
        OUT: "self_attn.v_proj",
        GATE_UP: "post_attention_layernorm",
        DOWN: "mlp.up_proj",
    }
    UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")

    def __init__(
        self, config: Mapping[str, Any], shape: AttentionShape, rotary: Rotary, num_tokens: int, device: torch.device
    ) -> None:
        config = complete_config(config, DEFAULTS)
        self._shape = shape
        self._eps = config["rms_norm_eps"]
        self._device = device
        self._ops = TorchOps()
        self._windows = attention_windows(config)
        self._num_tokens = num_tokens
        self._rotary = rotary
        rotary.allocate(num_tokens)

    def run(self, index: int, layer: LayerTensors, hidden: torch.Tensor, on_inputs: OnInputs) -> None:
        batches = torch.split(hidden, max(1, TOKENS_AT_A_TIME // self._num_tokens))
        mask = self._mask(self._windows[index])

        on_inputs(QKV, self._normed(batches, layer["input_layernorm.weight"]))
        attended = [self._attend(layer, x, mask).cpu() for x in self._normed(batches, layer["input_layernorm.weight"])]
        on_inputs(OUT, self._on_device(attended))
        self._add(batches, self._on_device(attended), layer, OUT[0])
        del attended

        on_inputs(GATE_UP, self._normed(batches, layer["post_attention_layernorm.weight"]))
        inner = [
            (functional.silu(_linear(layer, GATE_UP[0], x)) * _linear(layer, GATE_UP[1], x)).cpu()
            for x in self._normed(batches, layer["post_attention_layernorm.weight"])
        ]
        on_inputs(DOWN, self._on_device(inner))
        self._add(batches, self._on_device(inner), layer, DOWN[0])

    def _on_device(self, batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        return (batch.to(self._device) for batch in batches)

    def _normed(self, batches: tuple[torch.Tensor, ...], weight: torch.Tensor) -> Iterator[torch.Tensor]:
        return (self._ops.rms_norm(batch.to(self._device).flatten(0, 1), weight, self._eps) for batch in batches)

    def _add(
        self, batches: tuple[torch.Tensor, ...], inputs: Iterator[torch.Tensor], layer: LayerTensors, module: str
    ) -> None:
        """Add a matrix's outputs to the hidden states, in place."""
        for batch, x in zip(batches, inputs, strict=True):
            batch += _linear(layer, module, x).view_as(batch).to(batch.device)

    def _attend(self, layer: LayerTensors, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The inputs of o_proj, [samples * tokens, heads * head_dim], from x [samples * tokens, hidden_size]."""
        shape, num_tokens = self._shape, self._num_tokens
        num_samples = x.shape[0] // num_tokens
        qkv = torch.cat([_linear(layer, module, x) for module in QKV], dim=1)
        self._norm_heads(layer, qkv)
        self._ops.rotate(qkv, self._rotation(num_samples), shape.num_heads + shape.num_kv_heads)
        heads = qkv.view(num_samples, num_tokens, -1, shape.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        repeats = shape.num_heads // shape.num_kv_heads
        attended = functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(repeats, dim=1),
            v.repeat_interleave(repeats, dim=1),
            attn_mask=mask,
            is_causal=mask is None,
        )
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)

    def _norm_heads(self, layer: LayerTensors, qkv: torch.Tensor) -> None:
        """Norm queries and keys in place, where the family does: qkv [samples * tokens, all heads * head_dim]."""

    def _rotation(self, num_samples: int) -> Rotation:
        num_tokens = self._num_tokens
        starts = range(0, (num_samples + 1) * num_tokens, num_tokens)
        rows = torch.arange(num_tokens, device=self._device).repeat(num_samples)
        return self._rotary.prepare(rows, starts, [num_tokens] * num_samples, [num_tokens] * num_samples)

    def _mask(self, window: int | None) -> torch.Tensor | None:
        """[tokens, tokens], True if the token of the row sees that of the column; None: it sees all up to itself."""
        if window is None or window >= self._num_tokens:
            return None
        places = torch.arange(self._num_tokens, device=self._device)
        distance = places[:, None] - places
        return (distance >= 0) & (distance < window)


def _linear(layer: LayerTensors, module: str, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, layer[f"{module}.weight"], layer.get(f"{module}.bias"))
