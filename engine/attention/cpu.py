"""Paged attention on a CPU: one Numba kernel for decoding, prompts and chunks of prompts.

A work item is one KV head of a few neighbouring query tokens of one sequence: the query heads that share the KV head
and the tokens together make up to 32 rows that share every load of keys and values. Softmax is computed online, block
by block from the first one (Dao et al. 2022), so a row's additions always happen in the same order and its bits do not
depend on how the prompt was cut into chunks. With a sliding window the blocks that lie before it are skipped; those in
which only some of a work item's rows see something add exact zeros to the others.

Keys lie transposed within a block, `[num_blocks, num_kv_heads, head_dim, block_size]`, so that eight neighbouring keys
make one register; values lie as `[num_blocks, num_kv_heads, block_size, head_dim]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from engine.attention.base import AttentionMetadata, AttentionShape, LayerCache, RepeatableStep
from engine.layers.base import Rotation
from quant.kernels.arrays import FAST, call, flat_view, new_output
from quant.kernels.simd import (
    LANES,
    add,
    exp,
    first_lanes,
    fma,
    load,
    max_lanes,
    max_of,
    multiply,
    splat,
    store,
    store_one,
    subtract,
    sum_lanes,
    zeros,
)

BLOCK_SIZE = 2 * LANES
MAX_TILE_ROWS = 32
NO_WINDOW = 1 << 40
"""A number of tokens that no sequence has."""
LOWEST = np.float32(-3.4e38)
PARALLEL_SCORES = 256
"""Fewer pairs of query and key (for each head) are not worth starting a parallel region."""


@njit(**FAST)
def _write_kv(qkv, width, key_start, num_kv_heads, head_dim, slots, keys, values):  # type: ignore[no-untyped-def]
    value_start = key_start + num_kv_heads * head_dim
    for token in range(slots.shape[0]):
        block, offset = slots[token] // BLOCK_SIZE, slots[token] % BLOCK_SIZE
        for head in range(num_kv_heads):
            base = (block * num_kv_heads + head) * BLOCK_SIZE * head_dim
            source = token * width + head * head_dim
            for d in range(head_dim):
                store_one(keys, base + d * BLOCK_SIZE + offset, qkv[source + key_start + d])
                store_one(values, base + offset * head_dim + d, qkv[source + value_start + d])


@njit(inline="always")
def _score_rows(q, row, head_dim, keys, base, scores):  # type: ignore[no-untyped-def]
    """Scores of 4 rows against the block's 16 keys."""
    s00, s01, s10, s11 = zeros(), zeros(), zeros(), zeros()
    s20, s21, s30, s31 = zeros(), zeros(), zeros(), zeros()
    q0 = row * head_dim
    q1, q2, q3 = q0 + head_dim, q0 + 2 * head_dim, q0 + 3 * head_dim
    for d in range(head_dim):
        k0 = load(keys, base + d * BLOCK_SIZE)
        k1 = load(keys, base + d * BLOCK_SIZE + LANES)
        a = splat(q[q0 + d])
        s00, s01 = fma(a, k0, s00), fma(a, k1, s01)
        a = splat(q[q1 + d])
        s10, s11 = fma(a, k0, s10), fma(a, k1, s11)
        a = splat(q[q2 + d])
        s20, s21 = fma(a, k0, s20), fma(a, k1, s21)
        a = splat(q[q3 + d])
        s30, s31 = fma(a, k0, s30), fma(a, k1, s31)
    target = row * BLOCK_SIZE
    store(scores, target, s00)
    store(scores, target + LANES, s01)
    store(scores, target + BLOCK_SIZE, s10)
    store(scores, target + BLOCK_SIZE + LANES, s11)
    store(scores, target + 2 * BLOCK_SIZE, s20)
    store(scores, target + 2 * BLOCK_SIZE + LANES, s21)
    store(scores, target + 3 * BLOCK_SIZE, s30)
    store(scores, target + 3 * BLOCK_SIZE + LANES, s31)


@njit(inline="always")
def _hide_first(scores, row, num_hidden):  # type: ignore[no-untyped-def]
    """Hide the first keys of the block from a row: its window begins after them."""
    for i in range(row * BLOCK_SIZE, row * BLOCK_SIZE + min(BLOCK_SIZE, num_hidden)):
        scores[i] = np.float32(-np.inf)


@njit(inline="always")
def _soften_row(scores, row, num_visible, highest, total, sums, head_dim):  # type: ignore[no-untyped-def]
    """Turn a row's scores into weights relative to its highest score so far, rescaling what it summed before."""
    hidden = np.float32(-np.inf)
    target = row * BLOCK_SIZE
    s0 = first_lanes(num_visible, load(scores, target), hidden)
    s1 = first_lanes(num_visible - LANES, load(scores, target + LANES), hidden)
    top = max_lanes(max_of(s0, s1))
    if top > highest[row]:
        shrink = exp(splat(highest[row] - top))
        highest[row] = top
        total[row] = total[row] * max_lanes(shrink)
        for d in range(row * head_dim, (row + 1) * head_dim, LANES):
            store(sums, d, multiply(load(sums, d), shrink))
    base = splat(highest[row])
    w0, w1 = exp(subtract(s0, base)), exp(subtract(s1, base))
    total[row] += sum_lanes(add(w0, w1))
    store(scores, target, w0)
    store(scores, target + LANES, w1)


@njit(inline="always")
def _sum_values(scores, row, num_keys, head_dim, values, base, sums):  # type: ignore[no-untyped-def]
    """Add the weighted values of `num_keys` keys to the sums of 4 rows, 16 dimensions at a time."""
    p0 = row * BLOCK_SIZE
    p1, p2, p3 = p0 + BLOCK_SIZE, p0 + 2 * BLOCK_SIZE, p0 + 3 * BLOCK_SIZE
    for d in range(0, head_dim, 2 * LANES):
        o0 = row * head_dim + d
        o1, o2, o3 = o0 + head_dim, o0 + 2 * head_dim, o0 + 3 * head_dim
        s00, s01 = load(sums, o0), load(sums, o0 + LANES)
        s10, s11 = load(sums, o1), load(sums, o1 + LANES)
        s20, s21 = load(sums, o2), load(sums, o2 + LANES)
        s30, s31 = load(sums, o3), load(sums, o3 + LANES)
        for key in range(num_keys):
            v0 = load(values, base + key * head_dim + d)
            v1 = load(values, base + key * head_dim + d + LANES)
            a = splat(scores[p0 + key])
            s00, s01 = fma(a, v0, s00), fma(a, v1, s01)
            a = splat(scores[p1 + key])
            s10, s11 = fma(a, v0, s10), fma(a, v1, s11)
            a = splat(scores[p2 + key])
            s20, s21 = fma(a, v0, s20), fma(a, v1, s21)
            a = splat(scores[p3 + key])
            s30, s31 = fma(a, v0, s30), fma(a, v1, s31)
        store(sums, o0, s00)
        store(sums, o0 + LANES, s01)
        store(sums, o1, s10)
        store(sums, o1 + LANES, s11)
        store(sums, o2, s20)
        store(sums, o2 + LANES, s21)
        store(sums, o3, s30)
        store(sums, o3 + LANES, s31)


@njit(**FAST)
def _attend_item(  # type: ignore[no-untyped-def]
    item, qkv, width, num_heads, num_kv_heads, head_dim, scale, window, tiles, block_table, keys, values, out
):
    """tiles: as `CpuAttention.work_items` makes them."""
    group = num_heads // num_kv_heads
    num_tiles = tiles.shape[0]
    kv_head = item // num_tiles
    first_row, num_tokens = tiles[item % num_tiles, 0], tiles[item % num_tiles, 1]
    position, sequence = tiles[item % num_tiles, 2], tiles[item % num_tiles, 3]
    num_rows = num_tokens * group
    padded = (num_rows + 3) // 4 * 4
    q = np.zeros(padded * head_dim, np.float32)
    sums = np.zeros(padded * head_dim, np.float32)
    scores = np.empty(padded * BLOCK_SIZE, np.float32)
    highest = np.full(padded, LOWEST)  # finite: a row may see nothing of the tile's first blocks
    total = np.zeros(padded, np.float32)
    for row in range(num_rows):
        source = (first_row + row // group) * width + (kv_head * group + row % group) * head_dim
        for d in range(head_dim):
            q[row * head_dim + d] = qkv[source + d] * scale
    first_block = max(0, position + 1 - window) // BLOCK_SIZE
    for index in range(first_block, (position + num_tokens - 1) // BLOCK_SIZE + 1):
        base = (block_table[sequence, index] * num_kv_heads + kv_head) * BLOCK_SIZE * head_dim
        num_visible = position + 1 - index * BLOCK_SIZE  # keys of this block that the tile's first token sees
        for row in range(0, padded, 4):
            _score_rows(q, row, head_dim, keys, base, scores)
        if num_visible + num_tokens - 1 > window:  # the last token's window begins within this block or after it
            for row in range(padded):
                _hide_first(scores, row, num_visible + row // group - window)
        for row in range(padded):
            _soften_row(scores, row, num_visible + row // group, highest, total, sums, head_dim)
        # Slots past the sequence's end hold anything, so they are not touched even with weight 0.
        num_keys = min(BLOCK_SIZE, num_visible + num_tokens - 1)
        for row in range(0, padded, 4):
            _sum_values(scores, row, num_keys, head_dim, values, base, sums)
    for row in range(num_rows):
        target = (first_row + row // group) * num_heads * head_dim + (kv_head * group + row % group) * head_dim
        inverse = splat(np.float32(1.0) / total[row])
        for d in range(0, head_dim, LANES):
            store(out, target + d, multiply(load(sums, row * head_dim + d), inverse))


@njit(parallel=True, **FAST)
def _attend_parallel(num_items, args):  # type: ignore[no-untyped-def]
    for item in prange(num_items):
        _attend_item(item, *args)


@njit(**FAST)
def _attend_serial(num_items, args):  # type: ignore[no-untyped-def]
    for item in range(num_items):
        _attend_item(item, *args)


class CpuAttention:
    """`base.AttentionBackend` for float32 activations with a float32 or bfloat16 cache."""

    block_sizes = (BLOCK_SIZE,)
    max_captured_tokens = 0
    has_rotation = False

    @staticmethod
    def why_not(shape: AttentionShape) -> list[str]:
        if shape.head_dim % BLOCK_SIZE:
            return [f"head_dim {shape.head_dim} is not a multiple of {BLOCK_SIZE}"]
        return []

    def __init__(self, shape: AttentionShape, block_size: int) -> None:
        if block_size != BLOCK_SIZE:
            raise ValueError(f"the CPU attention kernel has blocks of {BLOCK_SIZE} tokens, not {block_size}")
        self.block_size = block_size
        self._shape = shape
        self._tile_tokens = max(1, MAX_TILE_ROWS // (shape.num_heads // shape.num_kv_heads))
        self._scale = np.float32(1 / math.sqrt(shape.head_dim))

    def block_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self._cache_size(1) * dtype.itemsize

    def allocate(self, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        size = self._cache_size(num_blocks)
        # Written, not calloc'ed: the memory must be there before the server says that it is ready.
        keys, values = torch.empty(size, dtype=dtype).fill_(0), torch.empty(size, dtype=dtype).fill_(0)
        return LayerCache(keys, values)

    def _cache_size(self, num_blocks: int) -> int:
        """The number of keys, or of values, in so many blocks."""
        return num_blocks * self._shape.num_kv_heads * BLOCK_SIZE * self._shape.head_dim

    def work_items(
        self, query_start_loc: Sequence[int], seq_lens: Sequence[int], table_width: int
    ) -> npt.NDArray[np.int32]:
        """Tiles [num_tiles, 4]: first query row, number of query rows, position of the first, sequence."""
        tiles: list[int] = []
        for sequence, seq_len in enumerate(seq_lens):
            start = query_start_loc[sequence]
            num_queries = query_start_loc[sequence + 1] - start
            for first in range(0, num_queries, self._tile_tokens):
                num_tokens = min(self._tile_tokens, num_queries - first)
                tiles += (start + first, num_tokens, seq_len - num_queries + first, sequence)
        return np.array(tiles, np.int32).reshape(-1, 4)

    def work_bytes(self, num_items: int) -> int:
        return 0

    def prepare(self, metadata: AttentionMetadata) -> RepeatableStep:
        starts, seq_lens = metadata.host_query_start_loc, metadata.host_seq_lens
        num_scores = sum((starts[index + 1] - starts[index]) * seq_len for index, seq_len in enumerate(seq_lens))
        tensors = metadata.work_items, metadata.block_table, metadata.slot_mapping
        return RepeatableStep((len(metadata.work_items), num_scores >= PARALLEL_SCORES), tensors)

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
        tiles, block_table, slots = (tensor.numpy() for tensor in prepared.tensors)
        key_start = shape.num_heads * shape.head_dim
        call(_write_kv, flat, width, key_start, shape.num_kv_heads, shape.head_dim, slots, keys, values)
        sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim, self._scale
        steps = tiles, block_table
        tensors = keys, values, flat_out
        attend = _attend_parallel if prepared.variant[1] else _attend_serial
        arguments = flat, width, *sizes, window or NO_WINDOW, *steps, *tensors
        call(attend, len(tiles) * shape.num_kv_heads, arguments)
        return out
