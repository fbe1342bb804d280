"""The Numba kernels of attention on a CPU. `engine.attention.cpu` says how they divide a step and what they read.

A work item is one KV head of a few neighbouring query tokens of one sequence: the query heads that share the KV head
and the tokens together make up to 64 rows that share every load of keys and values. The order of a row's additions
depends on the places of its keys alone: 64 keys, a span, go into a row's softmax together, 1,024 keys make a
part with a softmax of its own, and parts are merged from the first to the last. So a row's bits depend neither on how a
prompt was cut into chunks nor on whether its parts were computed by one thread or by many.

A head's blocks lie one after the other, so that a sequence whose blocks are neighbours is one stream to the processor's
prefetcher: keys as `[num_kv_heads, num_blocks, head_dim, 16]`, values as `[num_kv_heads, num_blocks, head_dim / 16, 16,
16]`, the last two being keys and dimensions. Both are read as they lie.

A cache whose arrays are words holds pairs of bfloat16, for AVX512-BF16: of two dimensions of a key, `[num_kv_heads,
num_blocks, head_dim / 2, 16]`, and of two keys' values, `[num_kv_heads, num_blocks, head_dim / 16, 8, 16]`. Queries and
a span's weights are rounded to bfloat16 then, and the products of a pair are added one after the other.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from engine.attention.attend_ops import (
    BLOCK_SIZE,
    LANES,
    SPAN,
    SPAN_BLOCKS,
    is_any_above,
    make_scores,
    make_sums,
    numbers_together,
    store_weights,
    weights_of,
    write_numbers,
)
from engine.attention.tiles_cpu import FIRST_PART, FIRST_ROW, NUM_TOKENS, PART, PARTIAL, POSITION, split_items
from quant.kernels.arrays import FAST
from quant.kernels.simd import (
    HAS_AVX512,
    add,
    exp,
    first_lanes,
    fma,
    load16,
    max_lanes,
    max_of,
    multiply,
    splat16,
    store,
    subtract,
    sum_lanes,
)

# Up to 24 of the 32 registers of AVX-512 hold sums. Elsewhere 16 lanes of four rows take eight of 16.
_score4, _score8, _score12 = (make_scores(rows, 1) for rows in (4, 8, 12))
_score4_twice, _score8_twice, _score12_twice = (make_scores(rows, 2) for rows in (4, 8, 12))
_sum4, _sum4_twice, _sum8_twice, _sum12_twice = (make_sums(*shape) for shape in ((4, 1), (4, 2), (8, 2), (12, 2)))
PART_BLOCKS = PART // BLOCK_SIZE
PARALLEL_TOKENS = 64
"""Fewer keys and values to write are not worth starting a parallel region."""
PARALLEL_PRODUCTS = 1 << 17
"""Fewer multiplications of queries with keys are not worth starting a parallel region: for one token that is 147 known
ones with 14 heads of 64, 64 with 16 heads of 128."""
MIN_SCORE = np.float32(-3.4e38)
"""The highest of no scores; finite, so that differences are numbers."""


@njit(inline="always")
def _write_token(qkv, width, key_start, num_kv_heads, head_dim, slot, token, head, together, keys, values):  # type: ignore[no-untyped-def]
    """Write one head's key and value of a token of qkv, flat [tokens, width], into its slot of the cache."""
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    num_blocks = keys.shape[0] // (num_kv_heads * BLOCK_SIZE * head_dim)
    base = (head * num_blocks + block) * BLOCK_SIZE * head_dim
    key = token * width + key_start + head * head_dim
    value = key + num_kv_heads * head_dim
    line, half = offset // together, offset % together
    for d in range(0, head_dim, LANES):
        write_numbers(qkv, key + d, keys, base + d * BLOCK_SIZE + offset * together, BLOCK_SIZE, together)
        place = base + d * BLOCK_SIZE + line * LANES * together + half
        write_numbers(qkv, value + d, values, place, together, 1)


@njit(parallel=True, **FAST)
def write_kv(qkv, width, key_start, num_kv_heads, head_dim, slots, together, keys, values):  # type: ignore[no-untyped-def]
    """Write all tokens, whose slots are `slots` [tokens].

    `together`: numbers that lie side by side in the cache, 2 where they are pairs, otherwise 1. Threads share many
    tokens head by head: neighbouring ones share lines of the processor's cache.
    """
    num_tokens = slots.shape[0]
    if num_tokens < PARALLEL_TOKENS:
        for token in range(num_tokens):
            for head in range(num_kv_heads):
                _write_token(
                    qkv, width, key_start, num_kv_heads, head_dim, slots[token], token, head, together, keys, values
                )
    else:
        for item in prange(num_kv_heads * num_tokens):
            head, token = item // num_tokens, item % num_tokens
            _write_token(
                qkv, width, key_start, num_kv_heads, head_dim, slots[token], token, head, together, keys, values
            )


@njit(inline="always")
def _tile_rows(num_rows):  # type: ignore[no-untyped-def]
    """Rows of the next tile if so many are left, a multiple of 4: tiles of 4 are slow, so only 4 become one."""
    if not HAS_AVX512 or num_rows == 4:
        return 4
    return 12 if num_rows == 12 or num_rows >= 20 else 8


@njit(inline="always")
def _score_rows(four, eight, twelve, q, num_rows, head_dim, keys, table, index, scores, column):  # type: ignore[no-untyped-def]
    """Scores of all rows, a multiple of 4, against the keys of block `index` or two, the span's from `column` on.

    `four`, and for AVX-512 alone `eight` and `twelve`, are the tiles of so many rows.
    """
    first_of_head, blocks, last = table
    row = 0
    while row < num_rows:
        rows, target = _tile_rows(num_rows - row), row * SPAN + column
        if HAS_AVX512 and rows == 12:
            twelve(q, row, num_rows, head_dim, keys, first_of_head, blocks, index, last, scores, target)
        elif HAS_AVX512 and rows == 8:
            eight(q, row, num_rows, head_dim, keys, first_of_head, blocks, index, last, scores, target)
        else:
            four(q, row, num_rows, head_dim, keys, first_of_head, blocks, index, last, scores, target)
        row += rows


@njit(inline="always")
def _mask_first(scores, row, num_masked):  # type: ignore[no-untyped-def]
    """Hide the first keys of the span from a row: its window begins after them."""
    for i in range(row * SPAN, row * SPAN + min(SPAN, num_masked)):
        scores[i] = np.float32(-np.inf)


@njit(inline="always")
def _softmax_row(keys, scores, row, num_visible, max_scores, totals, sums, head_dim):  # type: ignore[no-untyped-def]
    """Turn a row's scores into weights relative to its highest score so far, rescaling what it summed before."""
    place, lanes = row * SPAN, row * LANES
    s0, s1 = load16(scores, place), load16(scores, place + LANES)
    s2, s3 = load16(scores, place + 2 * LANES), load16(scores, place + 3 * LANES)
    if num_visible < SPAN:
        masked = np.float32(-np.inf)
        s0, s1 = first_lanes(num_visible, s0, masked), first_lanes(num_visible - LANES, s1, masked)
        s2 = first_lanes(num_visible - 2 * LANES, s2, masked)
        s3 = first_lanes(num_visible - 3 * LANES, s3, masked)
    highest = max_of(max_of(s0, s1), max_of(s2, s3))
    if is_any_above(highest, max_scores[row]):
        top = max_lanes(highest)
        rescale = exp(splat16(max_scores[row] - top))
        max_scores[row] = top
        store(totals, lanes, multiply(load16(totals, lanes), rescale))
        for d in range(row * head_dim, (row + 1) * head_dim, LANES):
            store(sums, d, multiply(load16(sums, d), rescale))
    base = splat16(max_scores[row])
    w0, w1 = weights_of(keys, subtract(s0, base)), weights_of(keys, subtract(s1, base))
    w2, w3 = weights_of(keys, subtract(s2, base)), weights_of(keys, subtract(s3, base))
    store(totals, lanes, add(load16(totals, lanes), add(add(w0, w1), add(w2, w3))))
    store_weights(keys, scores, row, 0, w0, w1)
    store_weights(keys, scores, row, 2 * LANES, w2, w3)


@njit(inline="always")
def _sum_rows(tile, width, row, scores, column, num_keys, head_dim, values, table, begin, end, sums):  # type: ignore[no-untyped-def]
    """Let a tile of some rows, from `row` on, and `width` dimensions add to all dimensions of its rows."""
    first_of_head, blocks, last = table
    place = row * SPAN + column // numbers_together(values)
    for d in range(0, head_dim, width):
        target = row * head_dim + d
        tile(scores, place, num_keys, head_dim, values, first_of_head, blocks, begin, end, last, d, sums, target)


@njit(inline="always")
def _sum_span(scores, column, num_rows, num_keys, head_dim, values, table, begin, end, sums):  # type: ignore[no-untyped-def]
    """Add the weighted values of blocks `begin : end` to the sums of all rows, flat [num_rows, head_dim]."""
    row = 0
    while row < num_rows:
        rows = _tile_rows(num_rows - row)
        if not HAS_AVX512 or head_dim % (2 * LANES):
            rows = 4
            _sum_rows(_sum4, LANES, row, scores, column, num_keys, head_dim, values, table, begin, end, sums)
        elif rows == 12:
            _sum_rows(_sum12_twice, 2 * LANES, row, scores, column, num_keys, head_dim, values, table, begin, end, sums)
        elif rows == 8:
            _sum_rows(_sum8_twice, 2 * LANES, row, scores, column, num_keys, head_dim, values, table, begin, end, sums)
        else:
            _sum_rows(_sum4_twice, 2 * LANES, row, scores, column, num_keys, head_dim, values, table, begin, end, sums)
        row += rows


@njit(inline="always")
def _merge_row(max_scores, totals, sums, row, top, total, part_sums, place, head_dim):  # type: ignore[no-untyped-def]
    """Merge a part of a row's softmax into those before it. What saw no key changes nothing, on either side."""
    joint = max(max_scores[row], top)
    before, after = exp(splat16(max_scores[row] - joint)), exp(splat16(top - joint))
    max_scores[row] = joint
    totals[row] = totals[row] * max_lanes(before) + total * max_lanes(after)
    target = row * head_dim
    for d in range(0, head_dim, LANES):
        store(sums, target + d, fma(load16(part_sums, place + d), after, multiply(load16(sums, target + d), before)))


@njit(inline="always")
def _finish_row(sums, row, total, head_dim, out, target):  # type: ignore[no-untyped-def]
    """Write a row's sums over the total of its weights to the output."""
    inverse = splat16(np.float32(1.0) / total)
    for d in range(0, head_dim, LANES):
        store(out, target + d, multiply(load16(sums, row * head_dim + d), inverse))


@njit(**FAST)
def _attend_part(q, num_rows, group, head_dim, window, position, num_tokens, blocks, first, last, kv, state):  # type: ignore[no-untyped-def]
    """One part's softmax of all rows of a tile, over the blocks `first : last` of the sequence's `blocks`."""
    keys, values, first_of_head = kv
    scores, max_scores, totals, sums = state
    table = first_of_head, blocks, last
    max_scores[:], totals[:], sums[:] = MIN_SCORE, 0.0, 0.0
    for span in range(first // SPAN_BLOCKS * SPAN_BLOCKS, last, SPAN_BLOCKS):
        begin, end = max(first, span), min(last, span + SPAN_BLOCKS)
        index = begin
        while HAS_AVX512 and index + 2 <= end:
            column = (index - span) * BLOCK_SIZE
            _score_rows(
                _score4_twice, _score8_twice, _score12_twice, q, num_rows, head_dim, keys, table, index, scores, column
            )
            index += 2
        while index < end:
            column = (index - span) * BLOCK_SIZE
            _score_rows(_score4, _score8, _score12, q, num_rows, head_dim, keys, table, index, scores, column)
            index += 1
        num_visible = position + 1 - span * BLOCK_SIZE  # keys of this span that the tile's first token sees
        if num_visible + num_tokens - 1 > window:  # the last token's window begins within this span or after it
            for row in range(num_rows):
                _mask_first(scores, row, num_visible + row // group - window)
        for row in range(num_rows):
            _softmax_row(keys, scores, row, num_visible + row // group, max_scores, totals, sums, head_dim)
        # Slots past the sequence's end hold anything, so they take no part, not even with weight 0.
        num_keys, column = position + num_tokens, (begin - span) * BLOCK_SIZE
        _sum_span(scores, column, num_rows, num_keys, head_dim, values, table, begin, end, sums)


@njit(**FAST)
def _attend_item(  # type: ignore[no-untyped-def]
    item, qkv, width, num_heads, num_kv_heads, head_dim, scale, window, tiles, block_table, keys, values, out, partials
):
    """One KV head of one tile.

    qkv flat [tokens, width], out flat [tokens, num_heads, head_dim]; tiles, partials, block_table as in `CpuAttention`.
    """
    group = num_heads // num_kv_heads
    head, tile = item % num_kv_heads, tiles[item // num_kv_heads]
    first_row, num_tokens, position, sequence, first_part, last_part, partial = tile
    num_rows = (num_tokens * group + 3) // 4 * 4
    q, rounded = np.zeros(num_rows * head_dim, np.float32), np.empty(head_dim, np.uint16)
    pairs, paired_q = rounded.view(np.uint32), q.view(np.uint32)
    scores = np.empty(num_rows * SPAN, np.float32)
    max_scores, totals = np.empty(num_rows, np.float32), np.empty(num_rows * LANES, np.float32)
    sums, all_sums = np.empty(num_rows * head_dim, np.float32), np.zeros(num_rows * head_dim, np.float32)
    all_max, all_totals = np.full(num_rows, MIN_SCORE), np.zeros(num_rows, np.float32)
    for row in range(num_tokens * group):
        source = (first_row + row // group) * width + (head * group + row % group) * head_dim
        if numbers_together(keys) == 2:
            for d in range(0, head_dim, LANES):
                store(rounded, d, multiply(load16(qkv, source + d), splat16(scale)))
            for pair in range(head_dim // 2):
                paired_q[pair * num_rows + row] = pairs[pair]
        else:
            for d in range(head_dim):
                q[d * num_rows + row] = qkv[source + d] * scale
    first_of_head = head * (keys.shape[0] * numbers_together(keys) // (num_kv_heads * BLOCK_SIZE * head_dim))
    first = max(0, position + 1 - window) // BLOCK_SIZE
    last = (position + num_tokens - 1) // BLOCK_SIZE + 1
    kv, state = (keys, values, first_of_head), (scores, max_scores, totals, sums)
    for part in range(max(first_part, first // PART_BLOCKS), last_part):
        begin, end = max(first, part * PART_BLOCKS), min(last, (part + 1) * PART_BLOCKS)
        blocks = block_table[sequence]
        _attend_part(q, num_rows, group, head_dim, window, position, num_tokens, blocks, begin, end, kv, state)
        for row in range(num_rows):
            total = sum_lanes(load16(totals, row * LANES))
            _merge_row(all_max, all_totals, all_sums, row, max_scores[row], total, sums, row * head_dim, head_dim)
    for row in range(num_tokens * group):
        if partial < 0:
            target = (first_row + row // group) * num_heads * head_dim + (head * group + row % group) * head_dim
            _finish_row(all_sums, row, all_totals[row], head_dim, out, target)
        else:
            partials[partial, head, row, :head_dim] = all_sums[row * head_dim : (row + 1) * head_dim]
            partials[partial, head, row, head_dim] = all_max[row]
            partials[partial, head, row, head_dim + 1] = all_totals[row]


@njit(**FAST)
def _num_products(tiles, num_heads, head_dim):  # type: ignore[no-untyped-def]
    """Multiplications of queries with keys, windows aside."""
    num_scores = 0
    for tile in range(tiles.shape[0]):
        if tiles[tile, FIRST_PART] == 0:
            num_tokens = tiles[tile, NUM_TOKENS]
            num_scores += num_tokens * (tiles[tile, POSITION] + num_tokens)
    return num_scores * num_heads * head_dim


@njit(parallel=True, **FAST)
def attend(num_threads, args):  # type: ignore[no-untyped-def]
    """All items, shared by the threads if there is much to do; args as `_attend_item` takes them after the item."""
    num_heads, num_kv_heads, head_dim, window, tiles = args[2], args[3], args[4], args[6], args[7]
    if _num_products(tiles, num_heads, head_dim) < PARALLEL_PRODUCTS:
        for item in range(tiles.shape[0] * num_kv_heads):
            _attend_item(item, *args)
    else:
        starts, _, _ = split_items(tiles, num_kv_heads, window, num_threads)
        for thread in prange(num_threads):
            for item in range(starts[thread], starts[thread + 1]):
                _attend_item(item, *args)


@njit(parallel=True, **FAST)
def merge_parts(tiles, num_heads, num_kv_heads, head_dim, out, partials):  # type: ignore[no-untyped-def]
    """Merge the parts of rows that were computed apart; in `tiles` they follow each other, the first one first."""
    group = num_heads // num_kv_heads
    for item in prange(tiles.shape[0] * num_kv_heads):
        tile, head = item // num_kv_heads, item % num_kv_heads
        if tiles[tile, PARTIAL] < 0 or tiles[tile, FIRST_PART] > 0:
            continue
        first_row, num_tokens = tiles[tile, FIRST_ROW], tiles[tile, NUM_TOKENS]
        for row in range(num_tokens * group):
            max_scores, totals = np.full(1, MIN_SCORE), np.zeros(1, np.float32)
            sums = np.zeros(head_dim, np.float32)
            place = tile
            while place < tiles.shape[0] and tiles[place, FIRST_ROW] == first_row:
                part = partials[tiles[place, PARTIAL], head, row]
                _merge_row(max_scores, totals, sums, 0, part[head_dim], part[head_dim + 1], part, 0, head_dim)
                place += 1
            target = (first_row + row // group) * num_heads * head_dim + (head * group + row % group) * head_dim
            _finish_row(sums, 0, totals[0], head_dim, out, target)
