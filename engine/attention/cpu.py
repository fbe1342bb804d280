"""Paged attention on a CPU: Numba kernels (`engine.attention.attend_cpu`) for decoding, prompts and chunks of prompts.

With a sliding window the blocks that lie before it are skipped; those in which only some of a work item's rows see
something add exact zeros to the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads

from engine.attention.attend_amx_ops import STEP_DIMENSIONS
from engine.attention.attend_cpu import attend, merge_parts, write_kv
from engine.attention.attend_ops import BLOCK_SIZE, LANES
from engine.attention.base import AttentionMetadata, AttentionShape, LayerCache, RepeatableStep
from engine.attention.tiles_cpu import LAST_PART, PART, PARTIAL, split_items
from engine.layers.base import Rotation
from quant.kernels.amx import HAS_AMX
from quant.kernels.arrays import call, flat_view, new_output
from quant.kernels.bfloat16_ops import HAS_PAIRS

MAX_TILE_ROWS = 64
NO_WINDOW = 1 << 40
"""A number of tokens that no sequence has."""
MAX_IMBALANCE = 1.15
"""Work of the thread that has most over the mean: parts are merged afterwards, which is not worth while for less."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeadMajorCache(LayerCache):
    """A flat cache in which all blocks of a head lie one after the other."""

    num_kv_heads: int

    def by_block(self, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.num_kv_heads, num_blocks, -1
        return self.keys.view(shape).transpose(0, 1), self.values.view(shape).transpose(0, 1)


class CpuAttention:
    """`base.AttentionBackend` for float32 activations with a float32 or bfloat16 cache."""

    block_sizes = (BLOCK_SIZE,)
    max_captured_tokens = 0
    has_rotation = False

    @staticmethod
    def why_not(shape: AttentionShape) -> list[str]:
        if shape.head_dim % LANES:
            return [f"head_dim {shape.head_dim} is not a multiple of {LANES}"]
        return []

    def __init__(self, shape: AttentionShape, block_size: int) -> None:
        if block_size != BLOCK_SIZE:
            raise ValueError(f"the CPU attention kernel has blocks of {BLOCK_SIZE} tokens, not {block_size}")
        self.block_size = block_size
        self._shape = shape
        group = shape.num_heads // shape.num_kv_heads
        self.tile_tokens = max(1, MAX_TILE_ROWS // group)
        self._partial_shape = shape.num_kv_heads, self.tile_tokens * group, shape.head_dim + 2
        self._num_threads = get_num_threads()
        self._is_paired = shape.is_rounded and HAS_PAIRS
        self._may_use_amx = HAS_AMX and shape.head_dim % STEP_DIMENSIONS == 0
        self._scale = np.float32(math.log2(math.e) / math.sqrt(shape.head_dim))  # softmax takes powers of 2
        self._no_partials = torch.empty(0, *self._partial_shape)

    def block_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self._cache_size(1) * dtype.itemsize

    def allocate(self, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        size = self._cache_size(num_blocks)
        keys, values = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
        return HeadMajorCache(keys, values, self._shape.num_kv_heads)

    def _cache_size(self, num_blocks: int) -> int:
        """The number of keys, or of values, in so many blocks."""
        return num_blocks * self._shape.num_kv_heads * BLOCK_SIZE * self._shape.head_dim

    def work_items(
        self, query_start_loc: Sequence[int], seq_lens: Sequence[int], table_width: int
    ) -> npt.NDArray[np.int32]:
        """Tiles [num_tiles, 7] (`tiles_cpu`). Where threads would wait for others, each part of the keys is one."""
        tiles: list[tuple[int, int, int, int]] = []
        for sequence, seq_len in enumerate(seq_lens):
            start = query_start_loc[sequence]
            num_queries = query_start_loc[sequence + 1] - start
            for first in range(0, num_queries, self.tile_tokens):
                num_tokens = min(self.tile_tokens, num_queries - first)
                tiles.append((start + first, num_tokens, seq_len - num_queries + first, sequence))
        whole = [(*tile, 0, -(-(tile[1] + tile[2]) // PART), -1) for tile in tiles]
        items = np.array(whole, np.int32).reshape(-1, PARTIAL + 1)
        if self._num_threads == 1 or all(tile[LAST_PART] < 2 for tile in whole) or self._is_balanced(items):
            return items
        return np.array(_in_parts(whole), np.int32)

    def _is_balanced(self, tiles: npt.NDArray[np.int32]) -> bool:
        """Whether no thread has much more to do than another."""
        _, longest, total = split_items(tiles, self._shape.num_kv_heads, NO_WINDOW, self._num_threads)
        return bool(longest * self._num_threads <= MAX_IMBALANCE * total)

    def work_bytes(self, num_items: int) -> int:
        return 0

    def prepare(self, metadata: AttentionMetadata) -> RepeatableStep:
        tiles = metadata.work_items
        is_split = bool((tiles.numpy()[:, PARTIAL] >= 0).any())
        # A row of a part: sums [head_dim], base, total of the weights (`softmax_cpu`).
        partials = torch.empty(tiles.shape[0], *self._partial_shape) if is_split else self._no_partials
        return RepeatableStep((is_split,), (tiles, metadata.block_table, metadata.slot_mapping, partials))

    def forward(
        self,
        qkv: torch.Tensor,
        cache: LayerCache,
        prepared: RepeatableStep,
        window: int | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        shape = self._shape
        num_tokens, width = qkv.shape
        out, flat_out = new_output(num_tokens, shape.num_heads * shape.head_dim)
        flat, keys, values = flat_view(qkv), flat_view(cache.keys), flat_view(cache.values)
        together = 2 if self._is_paired and cache.keys.dtype == torch.bfloat16 else 1
        key_start = shape.num_heads * shape.head_dim
        (is_split,) = prepared.variant
        tiles, block_table, slots, partials = (tensor.numpy() for tensor in prepared.tensors)
        sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim
        call(write_kv, flat, width, key_start, shape.num_kv_heads, shape.head_dim, slots, together, keys, values)
        if together == 2:
            keys, values = keys.view(np.uint32), values.view(np.uint32)
        tensors = tiles, block_table, keys, values, flat_out, partials
        uses_amx = int(together == 2 and self._may_use_amx)
        arguments = flat, width, *sizes, self._scale, window or NO_WINDOW, uses_amx, *tensors
        call(attend, self._num_threads, arguments)
        if is_split:
            call(merge_parts, tiles, *sizes, flat_out, partials)
        return out


def _in_parts(tiles: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """A tile for each part of each tile's keys, with a place for its partial results if there are several."""
    items: list[tuple[int, ...]] = []
    for *tile, first, last, _ in tiles:
        place = len(items) if last > 1 else -1
        items += [(*tile, part, part + 1, place if place < 0 else place + part) for part in range(first, last)]
    return items
