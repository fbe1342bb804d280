"""Triton kernels of paged attention: rotate and write, attend, combine.

A work item is a tile of query tokens of one sequence and some chunks of its cached tokens; a program of `attend_kernel`
computes items one after the other, for the query heads that share one key and value head. Within a chunk the softmax is
online. Chunks are merged by this kernel where an item has all of them, and by `combine_kernel` where each has an item
of its own. Chunks begin at multiples of CHUNK whatever the length, so the order in which a token's sums are made
depends on its position and on the size of its tile: not on other sequences, nor on which program has which item.

What a step's sequences decide is read from the plan, whose lines `engine.attention.triton` describes. Arguments and
grids are the same for all steps of the same number of rows, so that a graph may hold them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.skinny_triton import dot


@triton.jit
def write_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF], whose queries are rotated in place
    slots_ptr,  # [num_tokens] int64: where keys and values go, -1: a row of padding
    keys_ptr,  # [slots, NUM_KV_HEADS, 2 * HALF]
    values_ptr,
    cos_ptr,  # [positions, HALF] float32, unless HAS_ROTATION is false
    sin_ptr,
    angles_ptr,  # [num_tokens] int64: the row of cos and sin
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_ROTATION: tl.constexpr,
):
    """Some heads of a token: queries and keys are rotated, keys and values written to the cache."""
    NUM_ALL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    is_query = (head < NUM_HEADS) & (place < HALF)
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS) & (place < HALF)
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_ALL) & (place < HALF)
    first = qkv_ptr + (token * NUM_ALL + head) * (2 * HALF) + place
    low = tl.load(first, mask=is_query | is_key | is_value, other=0.0)
    high = tl.load(first + HALF, mask=is_query | is_key | is_value, other=0.0)
    if HAS_ROTATION:
        angle = tl.load(angles_ptr + token) * HALF + place
        cos = tl.load(cos_ptr + angle, mask=place < HALF, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=place < HALF, other=0.0)
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        low = tl.where(is_value, low, (wide_low * cos - wide_high * sin).to(dtype))
        high = tl.where(is_value, high, (wide_high * cos + wide_low * sin).to(dtype))
        tl.store(first, low, mask=is_query)
        tl.store(first + HALF, high, mask=is_query)
    key = keys_ptr + (slot * NUM_KV_HEADS + head - NUM_HEADS) * (2 * HALF) + place
    tl.store(key, low.to(keys_ptr.dtype.element_ty), mask=is_key)
    tl.store(key + HALF, high.to(keys_ptr.dtype.element_ty), mask=is_key)
    value = values_ptr + (slot * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * (2 * HALF) + place
    tl.store(value, low.to(values_ptr.dtype.element_ty), mask=is_value)
    tl.store(value + HALF, high.to(values_ptr.dtype.element_ty), mask=is_value)


@triton.jit
def merge(total_max, total_sum, total, chunk_max, chunk_sum, chunk):  # type: ignore[no-untyped-def]
    """A chunk's softmax after those before it: maxima and sums [rows], unnormalized results [rows, head_dim]."""
    new_max = tl.maximum(total_max, chunk_max)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    old, new = tl.exp(total_max - safe_max), tl.exp(chunk_max - safe_max)
    return new_max, total_sum * old + chunk_sum * new, total * old[:, None] + chunk * new[:, None]


@triton.jit(do_not_specialize=["window"])
def attend_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]
    keys_ptr,  # [slots, NUM_KV_HEADS, HEAD_DIM]
    values_ptr,
    out_ptr,  # [num_tokens, NUM_HEADS * HEAD_DIM]
    partial_ptr,  # [partials, NUM_HEADS, HEAD_DIM] float32
    stats_ptr,  # [partials, NUM_HEADS, 2] float32: maximum and sum
    plan_ptr,  # [lines, NUM_FIELDS] int32
    table_ptr,  # int32: the blocks of all sequences
    window,
    scale,
    HEADER: tl.constexpr,  # where in the plan the number of items stands, and the first one's line after it
    NUM_FIELDS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(1)
    num_items = tl.load(plan_ptr + HEADER)
    first_item = tl.load(plan_ptr + HEADER + 1)
    places = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    head = kv_head * GROUP + places % GROUP
    for index in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item = plan_ptr + (first_item + index) * NUM_FIELDS
        first_row = tl.load(item)
        num_tokens = tl.load(item + 1)
        first_position = tl.load(item + 2)
        table = table_ptr + tl.load(item + 3)
        first_chunk = tl.load(item + 4)
        end_chunk = tl.load(item + 5)
        partial = tl.load(item + 6)

        is_row = places < num_tokens * GROUP
        position = first_position + places // GROUP
        last_position = first_position + num_tokens - 1
        is_number = is_row[:, None] & is_dim[None, :]
        row = (first_row + places // GROUP).to(tl.int64)
        query = qkv_ptr + row[:, None] * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) + head[:, None] * HEAD_DIM
        query = tl.load(query + dims[None, :], mask=is_number, other=0.0)

        total_max = tl.full((TILE_ROWS,), float("-inf"), dtype=tl.float32)
        total_sum = tl.zeros((TILE_ROWS,), dtype=tl.float32)
        total = tl.zeros((TILE_ROWS, BLOCK_DIM), dtype=tl.float32)
        oldest = tl.maximum(first_position - window + 1, 0)  # the first token that any row of the tile sees
        for chunk in range(tl.maximum(first_chunk, oldest // CHUNK), end_chunk):
            chunk_max = tl.full((TILE_ROWS,), float("-inf"), dtype=tl.float32)
            chunk_sum = tl.zeros((TILE_ROWS,), dtype=tl.float32)
            result = tl.zeros((TILE_ROWS, BLOCK_DIM), dtype=tl.float32)
            for first_key in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, last_position + 1), TILE_KEYS):
                cached = first_key + tl.arange(0, TILE_KEYS)
                is_cached = cached <= last_position
                block = tl.load(table + cached // BLOCK_SIZE, mask=is_cached, other=0)
                slot = block.to(tl.int64) * BLOCK_SIZE + cached % BLOCK_SIZE
                places_of_keys = ((slot * NUM_KV_HEADS + kv_head) * HEAD_DIM)[:, None] + dims[None, :]
                mask = is_cached[:, None] & is_dim[None, :]
                keys = tl.load(keys_ptr + places_of_keys, mask=mask, other=0.0)
                scores = tl.zeros((TILE_ROWS, TILE_KEYS), dtype=tl.float32)
                scores = dot(query, tl.trans(keys), scores, WIDEN) * scale
                is_visible = (cached[None, :] <= position[:, None]) & (cached[None, :] > position[:, None] - window)
                scores = tl.where(is_visible, scores, float("-inf"))
                new_max = tl.maximum(chunk_max, tl.max(scores, 1))
                safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
                weights = tl.exp(scores - safe_max[:, None])
                shrink = tl.exp(chunk_max - safe_max)
                chunk_sum = chunk_sum * shrink + tl.sum(weights, 1)
                values = tl.load(values_ptr + places_of_keys, mask=mask, other=0.0)
                if not WIDEN:
                    weights = weights.to(values.dtype)
                result = dot(weights, values, result * shrink[:, None], WIDEN)
                chunk_max = new_max
            total_max, total_sum, total = merge(total_max, total_sum, total, chunk_max, chunk_sum, result)

        if partial < 0:
            total = total / total_sum[:, None]
            target = out_ptr + row[:, None] * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dims[None, :]
            tl.store(target, total.to(out_ptr.dtype.element_ty), mask=is_number)
        else:
            where = (partial + places // GROUP) * NUM_HEADS + head
            tl.store(partial_ptr + where[:, None] * HEAD_DIM + dims[None, :], total, mask=is_number)
            tl.store(stats_ptr + where * 2, total_max, mask=is_row)
            tl.store(stats_ptr + where * 2 + 1, total_sum, mask=is_row)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # [partials, NUM_HEADS, HEAD_DIM] float32
    stats_ptr,  # [partials, NUM_HEADS, 2] float32
    out_ptr,  # [num_tokens, NUM_HEADS * HEAD_DIM]
    plan_ptr,  # [lines, NUM_FIELDS] int32
    HEADER: tl.constexpr,  # where in the plan's first line the number of rows stands
    NUM_FIELDS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The chunks of one token and head, CHUNKS at a time. A chunk of which the token sees nothing changes no bit."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    if row >= tl.load(plan_ptr + HEADER):
        return
    line = plan_ptr + (1 + row) * NUM_FIELDS
    first_partial = tl.load(line)
    stride = tl.load(line + 1)
    num_chunks = tl.load(line + 2)
    if num_chunks == 0:
        return
    dims = tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    total_max = tl.full((1,), float("-inf"), dtype=tl.float32)
    total_sum = tl.zeros((1,), dtype=tl.float32)
    total = tl.zeros((1, BLOCK_DIM), dtype=tl.float32)
    for first_chunk in range(0, num_chunks, CHUNKS):
        chunk = first_chunk + tl.arange(0, CHUNKS)
        is_chunk = chunk < num_chunks
        index = (first_partial + chunk * stride) * NUM_HEADS + head
        chunk_max = tl.load(stats_ptr + index * 2, mask=is_chunk, other=float("-inf"))
        chunk_sum = tl.load(stats_ptr + index * 2 + 1, mask=is_chunk, other=0.0)
        mask = is_chunk[:, None] & is_dim[None, :]
        result = tl.load(partial_ptr + index[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        part_max = tl.max(chunk_max, 0)
        share = tl.exp(chunk_max - tl.where(part_max == float("-inf"), 0.0, part_max))
        part_sum = tl.sum(chunk_sum * share, 0)
        part = tl.sum(result * share[:, None], 0)
        total_max, total_sum, total = merge(total_max, total_sum, total, part_max, part_sum, part[None, :])
    result = (total / total_sum[:, None]).to(out_ptr.dtype.element_ty)
    where = out_ptr + (row.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(where[None, :], result, mask=is_dim[None, :])
