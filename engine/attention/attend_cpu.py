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
a span's weights are rounded to bfloat16 then, and the products of a pair are added one after the other, or as AMX does
it where there is that (`attend_amx_ops`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from engine.attention.attend_amx_ops import (
    STEP_DIMENSIONS,
    configure_attention,
    round_query,
)
from engine.attention.attend_ops import (
    BLOCK_SIZE,
    LANES,
    SPAN,
    SPAN_BLOCKS,
    numbers_together,
    write_columns,
    write_numbers,
)
from engine.attention.softmax_cpu import (
    MIN_SCORE,
    begin_softmax,
    finish_row,
    merge_row,
    new_softmax,
    update_softmax_row,
)
from engine.attention.spans_cpu import score_span, score_span_amx, sum_span, sum_span_amx
from engine.attention.tiles_cpu import FIRST_PART, FIRST_ROW, NUM_TOKENS, PART, PARTIAL, POSITION, split_items
from quant.kernels.amx import TILE_ROWS, release
from quant.kernels.arrays import FAST, empty_lines
from quant.kernels.simd import load16, sum_lanes
from quant.kernels.work_split import claim, even_block, new_claims

PART_BLOCKS = PART // BLOCK_SIZE
PARALLEL_TOKENS = 64
"""Fewer keys and values to write are not worth starting a parallel region."""
PARALLEL_PRODUCTS = 1 << 17
"""Fewer multiplications of queries with keys are not worth starting a parallel region: for one token that is 147 known
ones with 14 heads of 64, 64 with 16 heads of 128."""


class _Scratch(NamedTuple):
    """Memory of a thread for one work item after the other."""

    places: Any
    """Where each row's query begins, and as many places more as a vector has lanes."""
    q: Any
    """Queries, flat [head_dim, rows] or as words [head_dim / 2, rows], and places for as many more as a vector has.
    With AMX row by row: words [rows, head_dim / 2]."""
    scores: Any
    """Scores of a span, flat [rows, SPAN], then its weights."""
    whole: Any
    """The `Softmax` over all parts so far."""
    totals: Any
    """The total of each of its rows, [rows]."""
    part: Any
    """The `Softmax` over a part after the first one."""
    values: Any
    """uint32 [head_dim / 16, 32, 16]: a span's values as AMX takes them (`copy_values`)."""


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
def _mask_first(scores, row, num_masked):  # type: ignore[no-untyped-def]
    """Hide the first keys of the span from a row: its window begins after them."""
    for i in range(row * SPAN, row * SPAN + min(SPAN, num_masked)):
        scores[i] = np.float32(-np.inf)


@njit(**FAST)
def _new_scratch(tiles, group, head_dim):  # type: ignore[no-untyped-def]
    """Memory for any item of `tiles`, uninitialised."""
    num_tokens = 0
    for tile in range(tiles.shape[0]):
        num_tokens = max(num_tokens, tiles[tile, NUM_TOKENS])
    num_rows = (num_tokens * group + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS  # the last ones may be nobody's
    return _Scratch(
        np.empty(num_rows + LANES, np.int64),
        empty_lines((num_rows * head_dim + LANES) * 4).view(np.float32),
        empty_lines(num_rows * SPAN * 4).view(np.float32),
        new_softmax(num_rows, head_dim),
        np.empty(num_rows, np.float32),
        new_softmax(num_rows, head_dim),
        empty_lines(head_dim * SPAN * 2).view(np.uint32),
    )


@njit(inline="always")
def _padded(num_rows):  # type: ignore[no-untyped-def]
    """The rows of an item's tiles, of which the last ones may be nobody's."""
    return (num_rows + 3) // 4 * 4


@njit(inline="always")
def _transpose_queries(qkv, first, width, num_tokens, group, head_dim, scale, keys, scratch):  # type: ignore[no-untyped-def]
    """Write the scaled queries of an item, the first of which begins at `first`, column by column.

    16 rows always write 16 places of a column, so the last ones come first: what spills into the next column is
    written over.
    """
    num_rows = _padded(num_tokens * group)
    for token in range(num_tokens):
        for head in range(group):
            scratch.places[token * group + head] = first + token * width + head * head_dim
    for row in range(num_tokens * group, num_rows + LANES):
        scratch.places[row] = first
    for row in range((num_rows - 1) // LANES * LANES, -1, -LANES):
        for d in range(0, head_dim, LANES):
            write_columns(qkv, scratch.places[row:], scale, keys, scratch.q, row, num_rows, d)


@njit(inline="always")
def _round_queries(qkv, first, width, num_tokens, group, head_dim, scale, q):  # type: ignore[no-untyped-def]
    """Write the scaled queries of an item, the first of which begins at `first`, row by row as bfloat16."""
    for token in range(num_tokens):
        for head in range(group):
            source, target = first + token * width + head * head_dim, (token * group + head) * head_dim // 2
            for d in range(0, head_dim, STEP_DIMENSIONS):
                round_query(qkv, source + d, scale, q, target + d // 2)


@njit(**FAST)
def _attend_part(scratch, softmax, group, head_dim, window, position, num_tokens, blocks, first, last, kv, tile_rows):  # type: ignore[no-untyped-def]
    """One part's softmax of all rows of a tile, over the blocks `first : last` of the sequence's `blocks`.

    `tile_rows`: rows of a tile of AMX; 0: without it.
    """
    keys, values, first_of_head = kv
    scores, rows = scratch.scores, num_tokens * group
    num_rows, table = _padded(rows), (first_of_head, blocks, last)
    begin_softmax(softmax, num_rows, head_dim)
    for span in range(first // SPAN_BLOCKS * SPAN_BLOCKS, last, SPAN_BLOCKS):
        begin, end = max(first, span), min(last, span + SPAN_BLOCKS)
        if tile_rows > 0:
            score_span_amx(scratch.q, rows, tile_rows, head_dim, keys, table, begin, end, span, scores)
        else:
            score_span(scratch.q, num_rows, head_dim, keys, table, begin, end, span, scores)
        num_visible = position + 1 - span * BLOCK_SIZE  # keys of this span that the tile's first token sees
        if num_visible + num_tokens - 1 > window:  # the last token's window begins within this span or after it
            for token in range(num_tokens):
                for row in range(token * group, (token + 1) * group):
                    _mask_first(scores, row, num_visible + token - window)
        for token in range(num_tokens):
            for row in range(token * group, (token + 1) * group):
                update_softmax_row(keys, scores, row, num_visible + token, softmax, head_dim)
        # Slots past the sequence's end hold anything, so they take no part, not even with weight 0.
        num_keys, column = position + num_tokens, (begin - span) * BLOCK_SIZE
        if tile_rows > 0:
            sum_span_amx(scratch, rows, tile_rows, num_keys, head_dim, values, table, begin, end, softmax.sums)
        else:
            sum_span(scores, column, num_rows, num_keys, head_dim, values, table, begin, end, softmax.sums)


@njit(**FAST)
def _attend_item(item, scratch, args):  # type: ignore[no-untyped-def]
    """One KV head of one tile.

    Of args qkv is flat [tokens, width], out flat [tokens, num_heads, head_dim], and tiles, partials and block_table are
    as in `CpuAttention`.
    """
    qkv, width, num_heads, num_kv_heads, head_dim, scale, window, uses_amx, tiles, block_table = args[:10]
    keys, values, out, partials = args[10:]
    group = num_heads // num_kv_heads
    head, tile = item // tiles.shape[0], tiles[item % tiles.shape[0]]
    first_row, num_tokens, position, sequence, first_part, last_part, partial = tile
    first_query = first_row * width + head * group * head_dim
    tile_rows = 0
    if uses_amx:
        tile_rows = even_block(num_tokens * group, TILE_ROWS, 1)
        configure_attention(tile_rows)
        _round_queries(qkv, first_query, width, num_tokens, group, head_dim, scale, scratch.q)
    else:
        _transpose_queries(qkv, first_query, width, num_tokens, group, head_dim, scale, keys, scratch)
    first_of_head = head * (keys.shape[0] * numbers_together(keys) // (num_kv_heads * BLOCK_SIZE * head_dim))
    first = max(0, position + 1 - window) // BLOCK_SIZE
    last = (position + num_tokens - 1) // BLOCK_SIZE + 1
    kv, blocks = (keys, values, first_of_head), block_table[sequence]
    bases, sums, totals = scratch.whole.bases, scratch.whole.sums, scratch.totals
    first_part = max(first_part, first // PART_BLOCKS)
    if first_part >= last_part:  # all of the item's keys lie before the window
        begin_softmax(scratch.whole, _padded(num_tokens * group), head_dim)
        totals[: num_tokens * group] = 0.0
    for part in range(first_part, last_part):
        begin, end = max(first, part * PART_BLOCKS), min(last, (part + 1) * PART_BLOCKS)
        softmax = scratch.whole if part == first_part else scratch.part
        _attend_part(scratch, softmax, group, head_dim, window, position, num_tokens, blocks, begin, end, kv, tile_rows)
        for row in range(num_tokens * group):
            total = sum_lanes(load16(softmax.totals, row * LANES))
            if part == first_part:
                totals[row] = total
            else:
                merge_row(bases, totals, sums, row, softmax.bases[row], total, softmax.sums, row * head_dim, head_dim)
    if partial < 0:
        for token in range(num_tokens):
            target = ((first_row + token) * num_heads + head * group) * head_dim
            for row in range(token * group, (token + 1) * group):
                finish_row(sums, row, totals[row], head_dim, out, target)
                target += head_dim
    else:
        for row in range(num_tokens * group):
            partials[partial, head, row, :head_dim] = sums[row * head_dim : (row + 1) * head_dim]
            partials[partial, head, row, head_dim] = bases[row]
            partials[partial, head, row, head_dim + 1] = totals[row]
    if tile_rows > 0:
        release()


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
    """All items, shared by the threads if there is much to do; args as `_attend_item` takes them."""
    num_heads, num_kv_heads, head_dim, window, tiles = args[2], args[3], args[4], args[6], args[8]
    if _num_products(tiles, num_heads, head_dim) < PARALLEL_PRODUCTS:
        scratch = _new_scratch(tiles, num_heads // num_kv_heads, head_dim)
        for item in range(tiles.shape[0] * num_kv_heads):
            _attend_item(item, scratch, args)
    else:
        starts, _, _ = split_items(tiles, num_kv_heads, window, num_threads)
        claims = new_claims(num_threads)
        for thread in prange(num_threads):
            scratch = _new_scratch(tiles, num_heads // num_kv_heads, head_dim)
            for place in range(num_threads):
                owner = (thread + place) % num_threads
                num_items = starts[owner + 1] - starts[owner]
                index = claim(claims, owner, num_items)
                while index < num_items:
                    _attend_item(starts[owner] + index, scratch, args)
                    index = claim(claims, owner, num_items)


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
            bases, totals = np.full(1, MIN_SCORE), np.zeros(1, np.float32)
            sums = np.zeros(head_dim, np.float32)
            place = tile
            while place < tiles.shape[0] and tiles[place, FIRST_ROW] == first_row:
                part = partials[tiles[place, PARTIAL], head, row]
                merge_row(bases, totals, sums, 0, part[head_dim], part[head_dim + 1], part, 0, head_dim)
                place += 1
            target = (first_row + row // group) * num_heads * head_dim + (head * group + row % group) * head_dim
            finish_row(sums, 0, totals[0], head_dim, out, target)
