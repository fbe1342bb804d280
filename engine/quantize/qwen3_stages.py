"""A Qwen3 layer in stages: Qwen2's, with the norms of queries and keys before they are rotated."""

from __future__ import annotations

import torch

from engine.quantize.qwen2_stages import Qwen2Stages
from engine.quantize.stages import LayerTensors


class Qwen3Stages(Qwen2Stages):
    """Implements `engine.quantize.stages.LayerStages`."""

    def _norm_heads(self, layer: LayerTensors, qkv: torch.Tensor) -> None:
        counts = {"q_norm": self._shape.num_heads, "k_norm": self._shape.num_kv_heads}
        weights = [layer[f"self_attn.{name}.weight"].expand(count, -1) for name, count in counts.items()]
        self._ops.norm_heads(qkv, torch.cat(weights), self._eps)
