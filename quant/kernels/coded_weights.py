"""bfloat16 weights whose upper bytes are codes: how a matrix is put into that form (`coded_ops`), losing nothing.

Every tile has a table of its own: the 16 upper bytes that are most frequent in a sample of its weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from quant.kernels.arrays import FAST, new_weight
from quant.kernels.bfloat16_ops import INPUTS, INTERLEAVED_PAIRS, OUTPUTS, PAIR_WEIGHTS
from quant.kernels.coded_ops import (
    BYTE_ORDER,
    CODE_BITS,
    CODE_BYTES,
    NUM_CODES,
    PAIR_BYTES,
    TABLE_BYTES,
)

MAX_MARKED_SHARE = 1 / 32
"""Share of pairs at most that are kept as they are. With more, a matrix has too many different upper bytes."""
SAMPLE_STEP = 5
"""Every fifth weight of an output is counted for the table."""
NO_CODE = 255
NO_PAIR = (1 << 31) - 1
_FIRST_BYTES = np.array(BYTE_ORDER).reshape(-1)[::INPUTS]
"""Where each output's weights of a pair begin among the pair's bytes; they stay neighbours."""


class CodedWeights(NamedTuple):
    """A matrix in tiles of `OUTPUTS` outputs, and in stretches of inputs that are computed one after the other."""

    coded: npt.NDArray[np.uint8]
    """[tiles, pairs, PAIR_BYTES]: a pair's lower bytes in `BYTE_ORDER`, then their codes, two in a byte: that of a
    weight of the first half and, above it, of one of the second. Empty: nothing is coded."""
    tables: npt.NDArray[np.uint8]
    """[tiles, TABLE_BYTES]: the upper byte of each code."""
    raw: npt.NDArray[np.uint16]
    """[marks, OUTPUTS, INPUTS]: pairs in which an upper byte has no code; their codes in `coded` mean nothing."""
    marks: npt.NDArray[np.int32]
    """[marks + 1]: which pair of the matrix each of them is, in order, and NO_PAIR."""
    first_marks: npt.NDArray[np.int64]
    """[tiles, stretches]: the first mark that is not before a stretch."""

    @classmethod
    def empty(cls) -> CodedWeights:
        """What stands for the codes of a matrix that has none."""
        nothing = np.empty(0, np.uint8)
        return cls(nothing, nothing, nothing.view(np.uint16), nothing.view(np.int32), nothing.view(np.int64))


def encode(
    w: npt.NDArray[np.uint16], order: npt.NDArray[np.int64], k_size: int, inputs_each: int
) -> CodedWeights | None:
    """Code the matrix w, flat [*, k_size], its rows in `order`; None: too many upper bytes of it have no code.

    A stretch has `inputs_each` inputs, the last one maybe fewer. The last output fills up the last tile.
    """
    num_tiles, num_pairs = -(-len(order) // OUTPUTS), k_size // INPUTS
    tables, codes = np.empty((num_tiles, TABLE_BYTES), np.uint8), np.empty((num_tiles, 256), np.uint8)
    shares = np.empty(num_tiles, np.float64)
    _make_tables(w, order, k_size, tables, codes, shares)
    if 1 - (1 - shares.mean()) ** PAIR_WEIGHTS > 2 * MAX_MARKED_SHARE:  # by a small sample, before codes take memory
        return None
    coded, is_marked = new_weight(num_tiles * num_pairs * PAIR_BYTES), np.empty((num_tiles, num_pairs), np.bool_)
    _encode(w, order, k_size, codes, coded, is_marked, _FIRST_BYTES)
    marks = np.flatnonzero(is_marked)
    if len(marks) > MAX_MARKED_SHARE * is_marked.size:
        return None
    tiles, pairs = np.divmod(marks, num_pairs)
    outputs = np.minimum(tiles[:, None] * OUTPUTS + np.arange(OUTPUTS), len(order) - 1)
    raw = w.reshape(-1, num_pairs, INPUTS)[order[outputs], pairs[:, None]]
    stretches = np.arange(num_tiles)[:, None] * num_pairs + np.arange(0, k_size, inputs_each) // INPUTS
    first_marks = np.searchsorted(marks, stretches.reshape(-1))
    all_marks = np.append(marks, NO_PAIR).astype(np.int32)
    return CodedWeights(coded, tables.reshape(-1), raw.reshape(-1), all_marks, first_marks)


@njit(parallel=True, **FAST)
def _make_tables(w, order, k_size, tables, codes, shares):  # type: ignore[no-untyped-def]
    """Fill, for each tile, tables [TABLE_BYTES], codes [256]: each upper byte's, or NO_CODE, and the sample's share of
    weights without one.
    """
    for tile in prange(len(tables)):
        counts, num_coded = np.zeros(256, np.int64), 0
        for n in range(tile * OUTPUTS, min(len(order), (tile + 1) * OUTPUTS)):
            for k in range(order[n] * k_size, (order[n] + 1) * k_size, SAMPLE_STEP):
                counts[w[k] >> 8] += 1
        num_counted = counts.sum()
        codes[tile] = NO_CODE
        for code in range(NUM_CODES):
            high = np.argmax(counts)
            num_coded += max(counts[high], 0)
            codes[tile, high], counts[high] = code, -1
            for place in range(code, TABLE_BYTES, NUM_CODES):
                tables[tile, place] = high
        shares[tile] = 1 - num_coded / num_counted


@njit(parallel=True, **FAST)
def _encode(w, order, k_size, codes, coded, is_marked, first_bytes):  # type: ignore[no-untyped-def]
    num_pairs = k_size // INPUTS
    for tile in prange(len(codes)):
        weights, pair_codes = np.empty((INTERLEAVED_PAIRS, PAIR_WEIGHTS), np.uint16), np.empty(PAIR_WEIGHTS, np.uint8)
        for first in range(0, num_pairs, INTERLEAVED_PAIRS):
            last = min(num_pairs, first + INTERLEAVED_PAIRS)
            for n in range(tile * OUTPUTS, (tile + 1) * OUTPUTS):
                start, place = order[min(n, len(order) - 1)] * k_size, first_bytes[n % OUTPUTS]
                for pair in range(first, last):
                    for half in range(INPUTS):
                        weights[pair - first, place + half] = w[start + pair * INPUTS + half]
            for pair in range(first, last):
                at, highest = (tile * num_pairs + pair) * PAIR_BYTES, np.uint8(0)
                for i in range(PAIR_WEIGHTS):
                    coded[at + i] = weights[pair - first, i] & 255
                    pair_codes[i] = codes[tile, weights[pair - first, i] >> 8]
                for i in range(PAIR_WEIGHTS):
                    highest = max(highest, pair_codes[i])
                for i in range(CODE_BYTES):
                    coded[at + PAIR_WEIGHTS + i] = pair_codes[i] & 15 | pair_codes[CODE_BYTES + i] << CODE_BITS
                is_marked[tile, pair] = highest == NO_CODE
