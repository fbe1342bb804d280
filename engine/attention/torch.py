"""Attention in plain torch: the reference implementation, which also runs on every device without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from engine.attention.base import AttentionMetadata, AttentionShape, LayerCache
from engine.layers.base import Rotation

MAX_SCORES = 1 << 26
"""Scores that exist at a time, of all heads together; torch holds them up to three times, in float32."""


class TorchAttention:
    """Gathers each sequence's keys and values and calls scaled_dot_product_attention, with some queries at a time."""

    block_sizes = (16, 32, 64, 128)
    max_captured_tokens = 0
    has_rotation = False

    @staticmethod
    def why_not(shape: AttentionShape) -> list[str]:
        return []

    def __init__(self, shape: AttentionShape, block_size: int) -> None:
        self._shape = shape
        self.block_size = block_size

    def block_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.block_size * self._shape.num_kv_heads * self._shape.head_dim * dtype.itemsize

    def allocate(self, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        size = (num_blocks * self.block_size, self._shape.num_kv_heads, self._shape.head_dim)
        return LayerCache(torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device))

    def work_items(
        self, query_start_loc: Sequence[int], seq_lens: Sequence[int], table_width: int
    ) -> npt.NDArray[np.int32]:
        """An empty array: `forward` walks over the sequences."""
        return np.empty((0, 0), np.int32)

    def work_bytes(self, num_items: int) -> int:
        return 0

    def prepare(self, metadata: AttentionMetadata) -> AttentionMetadata:
        return metadata

    def forward(
        self,
        qkv: torch.Tensor,
        cache: LayerCache,
        prepared: AttentionMetadata,
        window: int | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        shape = self._shape
        heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
        query, key, value = torch.split(heads, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        cache.keys[prepared.slot_mapping] = key.to(cache.keys.dtype)
        cache.values[prepared.slot_mapping] = value.to(cache.values.dtype)
        starts = prepared.host_query_start_loc
        out = torch.empty_like(query)
        for index, seq_len in enumerate(prepared.host_seq_lens):
            rows = slice(starts[index], starts[index + 1])
            slots = self._slots(prepared.block_table[index], seq_len)
            key, value = cache.keys[slots].to(query.dtype), cache.values[slots].to(query.dtype)
            self._attend(out[rows], query[rows], key, value, window)
        return out.view(qkv.shape[0], -1)

    def _slots(self, block_row: torch.Tensor, seq_len: int) -> torch.Tensor:
        positions = torch.arange(seq_len, device=block_row.device)
        return block_row.long()[positions // self.block_size] * self.block_size + positions % self.block_size

    def _attend(
        self, out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> None:
        """Write into out [n, num_heads, head_dim], a few queries after the other: their scores need little memory.

        query [n, num_heads, head_dim] are the last n of the key's and value's [seq_len, num_kv_heads, head_dim].
        """
        num_queries, seq_len = query.shape[0], key.shape[0]
        positions = torch.arange(seq_len, device=query.device)
        num_at_a_time = max(1, MAX_SCORES // (query.shape[1] * seq_len))
        for first in range(0, num_queries, num_at_a_time):
            part = slice(first, min(first + num_at_a_time, num_queries))
            query_positions = positions[seq_len - num_queries + part.start : seq_len - num_queries + part.stop, None]
            is_visible = positions <= query_positions  # [queries, seq_len]
            if window is not None:
                is_visible &= positions > query_positions - window
            attended = functional.scaled_dot_product_attention(
                query[part].transpose(0, 1),
                key.transpose(0, 1),
                value.transpose(0, 1),
                attn_mask=is_visible,
                enable_gqa=True,
            )
            out[part] = attended.transpose(0, 1)
