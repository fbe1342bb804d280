"""Triton kernels of paged attention: write, attend, combine.

A program of `attend_kernel` computes one work item: a tile of query tokens of one sequence, for the query heads that
share one key and value head, over some chunks of the sequence's cached tokens. Within a chunk the softmax is online;
chunks are merged in their order, by this kernel where an item has all of them and by `combine_kernel` where each has an
item of its own. Chunks begin at multiples of CHUNK whatever the length, so the order in which a token's sums are made
depends on its position and on the size of its tile: not on other sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.skinny_triton import dot


@triton.jit
def write_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]
    slots_ptr,  # [num_tokens] int64: where keys and values go
    keys_ptr,  # [slots, NUM_KV_HEADS, HEAD_DIM]
    values_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The keys and values of a token; they lie side by side in qkv as in the cache."""
    SIZE: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = place < SIZE
    source = qkv_ptr + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) + NUM_HEADS * HEAD_DIM + place
    target = tl.load(slots_ptr + token) * SIZE + place
    keys = tl.load(source, mask=is_inside, other=0.0)
    values = tl.load(source + SIZE, mask=is_inside, other=0.0)
    tl.store(keys_ptr + target, keys.to(keys_ptr.dtype.element_ty), mask=is_inside)
    tl.store(values_ptr + target, values.to(values_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def merge(total_max, total_sum, total, chunk_max, chunk_sum, chunk):  # type: ignore[no-untyped-def]
    """A chunk's softmax after those before it: maxima and sums [rows], unnormalized results [rows, head_dim]."""
    new_max = tl.maximum(total_max, chunk_max)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    old, new = tl.exp(total_max - safe_max), tl.exp(chunk_max - safe_max)
    return new_max, total_sum * old + chunk_sum * new, total * old[:, None] + chunk * new[:, None]


@triton.jit(do_not_specialize=["first_item", "table_width", "window"])
def attend_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]
    keys_ptr,  # [slots, NUM_KV_HEADS, HEAD_DIM]
    values_ptr,
    out_ptr,  # [num_tokens, NUM_HEADS * HEAD_DIM]
    partial_ptr,  # [partials, NUM_HEADS, HEAD_DIM] float32
    stats_ptr,  # [partials, NUM_HEADS, 2] float32: maximum and sum
    items_ptr,  # [items, NUM_FIELDS] int64, as `engine.attention.triton` describes them
    starts_ptr,  # [num_seqs + 1] int32: first query token of each sequence
    lens_ptr,  # [num_seqs] int32
    table_ptr,  # [num_seqs, table_width] int32
    first_item,
    table_width,
    window,
    scale,
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
    TOKENS: tl.constexpr = TILE_ROWS // GROUP
    item = items_ptr + (first_item + tl.program_id(0)) * NUM_FIELDS
    kv_head = tl.program_id(1)
    sequence = tl.load(item)
    first_token = tl.load(item + 1).to(tl.int32)
    first_chunk = tl.load(item + 2).to(tl.int32)
    end_chunk = tl.load(item + 3).to(tl.int32)
    partial = tl.load(item + 4)
    start = tl.load(starts_ptr + sequence)
    num_queries = tl.load(starts_ptr + sequence + 1) - start
    seq_len = tl.load(lens_ptr + sequence)

    places = tl.arange(0, TILE_ROWS)
    token = first_token + places // GROUP
    head = kv_head * GROUP + places % GROUP
    is_row = (places < TOKENS * GROUP) & (token < num_queries)
    first_position = seq_len - num_queries + first_token
    position = first_position + places // GROUP
    last_position = seq_len - num_queries + tl.minimum(first_token + TOKENS, num_queries) - 1
    dims = tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    is_number = is_row[:, None] & is_dim[None, :]
    row = (start + token).to(tl.int64)
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
            block = tl.load(table_ptr + sequence * table_width + cached // BLOCK_SIZE, mask=is_cached, other=0)
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
        index = (partial + places // GROUP) * NUM_HEADS + head
        tl.store(partial_ptr + index[:, None] * HEAD_DIM + dims[None, :], total, mask=is_number)
        tl.store(stats_ptr + index * 2, total_max, mask=is_row)
        tl.store(stats_ptr + index * 2 + 1, total_sum, mask=is_row)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # [partials, NUM_HEADS, HEAD_DIM] float32
    stats_ptr,  # [partials, NUM_HEADS, 2] float32
    out_ptr,  # [num_tokens, NUM_HEADS * HEAD_DIM]
    items_ptr,  # [items, NUM_FIELDS] int64: the first chunks of split tiles come first
    starts_ptr,  # [num_seqs + 1] int32
    NUM_FIELDS: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The chunks of one token and head, merged in their order as `attend_kernel` merges them."""
    item = items_ptr + tl.program_id(0) // TOKENS * NUM_FIELDS
    place = tl.program_id(0) % TOKENS
    head = tl.program_id(1)
    sequence = tl.load(item)
    partial = tl.load(item + 4) + place
    num_chunks = tl.load(item + 5).to(tl.int32)
    token = tl.load(starts_ptr + sequence) + tl.load(item + 1) + place
    num_tokens = tl.minimum(tl.load(starts_ptr + sequence + 1) - token + place, TOKENS)
    if place >= num_tokens:
        return
    dims = tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    one = tl.arange(0, 1)
    total_max = tl.full((1,), float("-inf"), dtype=tl.float32)
    total_sum = tl.zeros((1,), dtype=tl.float32)
    total = tl.zeros((1, BLOCK_DIM), dtype=tl.float32)
    for chunk in range(0, num_chunks):
        index = (partial + chunk * num_tokens) * NUM_HEADS + head
        chunk_max = tl.load(stats_ptr + index * 2 + one)
        chunk_sum = tl.load(stats_ptr + index * 2 + 1 + one)
        result = tl.load(partial_ptr + index * HEAD_DIM + dims, mask=is_dim, other=0.0)[None, :]
        total_max, total_sum, total = merge(total_max, total_sum, total, chunk_max, chunk_sum, result)
    result = (total / total_sum[:, None]).to(out_ptr.dtype.element_ty)
    where = out_ptr + (token * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(where[None, :], result, mask=is_dim[None, :])
