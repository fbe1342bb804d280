"""Tiles of attention on a CPU, in numbers, and how threads share them.

A tile is a line [7]: first query row, number of query tokens, position of the first, sequence, the first part of its
keys, the part after the last, and the place of its partial results; -1: it has all parts, and its results go straight
into the output. Each tile is an item for every KV head. Items of a head follow each other: a prompt's keys and values
of a head stay in a core's L2 cache, those of all heads do not.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quant.kernels.arrays import FAST

FIRST_ROW, NUM_TOKENS, POSITION, FIRST_PART, LAST_PART, PARTIAL = 0, 1, 2, 4, 5, 6
"""Columns."""
PART = 1024
"""Keys of a part."""
ITEM_KEYS = 16
"""Keys that would cost as much as the beginning and the end of an item."""


@njit(**FAST)
def split_items(tiles, num_kv_heads, window, num_threads):  # type: ignore[no-untyped-def]
    """Cut the items into a range for each thread, all with about as many pairs of query and key.

    Returns the first item of each range and at last the number of items, the pairs of the longest range, and all pairs.
    """
    pairs = np.empty(tiles.shape[0], np.int64)
    for index in range(tiles.shape[0]):
        num_tokens, position = tiles[index, NUM_TOKENS], tiles[index, POSITION]
        first = max(tiles[index, FIRST_PART] * PART, position + 1 - window)
        last = min(tiles[index, LAST_PART] * PART, position + num_tokens)
        pairs[index] = (max(last - first, 0) + ITEM_KEYS) * num_tokens
    num_items, total, done, next_thread = tiles.shape[0] * num_kv_heads, pairs.sum() * num_kv_heads, 0, 0
    starts, loads = np.full(num_threads + 1, num_items), np.zeros(num_threads, np.int64)
    for item in range(num_items):
        weight = pairs[item % tiles.shape[0]]
        thread = (2 * done + weight) * num_threads // (2 * total)  # in whose part of the work the item's middle lies
        while next_thread <= thread:
            starts[next_thread] = item
            next_thread += 1
        loads[thread] += weight
        done += weight
    return starts, loads.max(), total
