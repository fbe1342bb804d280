"""bfloat16 weights whose upper bytes are codes: how a matrix is put into that form (`coded_ops`), losing nothing.

Every tile has a table of its own: the 16 upper bytes that are most frequent in a sample of its weights.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from quant.kernels.arrays import FAST, new_weight
from quant.kernels.bfloat16_ops import INPUTS, LANES, OUTPUTS
from quant.kernels.coded_ops import CODE_BITS, CODE_BYTES, NUM_CODES, NUMBERS, PAIR_BYTES, TABLE_BYTES

MAX_MARKED = 1 / 32
"""Share of pairs at most that are kept as they are. With more, a matrix has too many different upper bytes."""
INTERLEAVED_PAIRS = 16
"""Pairs of an output's inputs that are moved at a time: a cache line. What is written stays in the cache meanwhile."""
SAMPLE_STEP = 5
"""Every fifth weight of an output is counted for the table."""
NO_CODE = 255
NO_PAIR = -1


@dataclasses.dataclass(frozen=True, slots=True)
class CodedWeights:
    """A matrix in tiles of `OUTPUTS` outputs, and in stretches of inputs that are computed one after the other."""

    coded: npt.NDArray[np.uint8]
    """[tiles, pairs, PAIR_BYTES]: a pair's lower bytes in the order of `unit_order`, then their codes."""
    tables: npt.NDArray[np.uint8]
    """[tiles, TABLE_BYTES]: the upper byte of each code."""
    raw: npt.NDArray[np.uint16]
    """[marks, OUTPUTS, INPUTS]: pairs in which an upper byte has no code; their lower bytes in `coded` mean nothing."""
    marks: npt.NDArray[np.int32]
    """[marks + 1]: which pair of the matrix each of them is, in order, and NO_PAIR."""
    first_marks: npt.NDArray[np.int64]
    """[tiles, stretches]: the first mark that is not before a stretch."""

    @classmethod
    def none(cls) -> CodedWeights:
        """What stands for the codes of a matrix that has none."""
        byte = np.empty(0, np.uint8)
        return cls(byte, byte, byte.view(np.uint16), byte.view(np.int32), byte.view(np.int64))


def encode(
    w: npt.NDArray[np.uint16], order: npt.NDArray[np.int64], k_size: int, stretch_inputs: int
) -> CodedWeights | None:
    """Code the matrix w [*, k_size], its rows in `order`; None: too many upper bytes of it have no code.

    Stretches have so many inputs each, but the last.
    """
    num_tiles, num_pairs = -(-len(order) // OUTPUTS), k_size // INPUTS
    coded, tables = new_weight(num_tiles * num_pairs * PAIR_BYTES), np.empty((num_tiles, TABLE_BYTES), np.uint8)
    is_marked = np.empty((num_tiles, num_pairs), np.bool_)
    _encode(w, order, k_size, coded, tables, is_marked)
    marks = np.flatnonzero(is_marked)
    if len(marks) > MAX_MARKED * is_marked.size:
        return None
    raw = np.empty((len(marks), NUMBERS), np.uint16)
    _copy_marked(w, order, k_size, marks, raw)
    stretches = np.arange(num_tiles)[:, None] * num_pairs + np.arange(0, k_size, stretch_inputs) // INPUTS
    first_marks = np.searchsorted(marks, stretches.reshape(-1))
    return CodedWeights(
        coded, tables.reshape(-1), raw.reshape(-1), np.append(marks, NO_PAIR).astype(np.int32), first_marks
    )


@njit(inline="always")
def _weight(w, order, k_size, n, k):  # type: ignore[no-untyped-def]
    return w[order[n] * k_size + k] if n < len(order) else np.uint16(0)


@njit(**FAST)
def _make_table(w, order, k_size, tile, table):  # type: ignore[no-untyped-def]
    """Fill table uint8 [TABLE_BYTES]; the code of each upper byte, or NO_CODE."""
    counts, codes = np.zeros(256, np.int64), np.full(256, NO_CODE, np.uint8)
    for n in range(tile * OUTPUTS, (tile + 1) * OUTPUTS):
        for k in range(0, k_size, SAMPLE_STEP):
            counts[_weight(w, order, k_size, n, k) >> 8] += 1
    for code in range(NUM_CODES):
        high = np.argmax(counts)
        codes[high], counts[high] = code, -1
        for place in range(code, TABLE_BYTES, NUM_CODES):
            table[place] = high
    return codes


@njit(parallel=True, **FAST)
def _encode(w, order, k_size, coded, tables, is_marked):  # type: ignore[no-untyped-def]
    num_pairs = k_size // INPUTS
    for tile in prange(len(tables)):
        codes = _make_table(w, order, k_size, tile, tables[tile])
        places = np.empty(NUMBERS, np.int64)
        for i in range(NUMBERS):
            unit, word = i // (LANES * INPUTS), i % (LANES * INPUTS)
            places[i] = word // 8 * 16 + unit * 8 + word % 8
        numbers, found = np.zeros((INTERLEAVED_PAIRS, NUMBERS), np.uint16), np.empty(NUMBERS, np.uint8)
        for first in range(0, num_pairs, INTERLEAVED_PAIRS):
            last = min(num_pairs, first + INTERLEAVED_PAIRS)
            for n in range(tile * OUTPUTS, min(len(order), (tile + 1) * OUTPUTS)):
                start, place = order[n] * k_size, places[n % OUTPUTS * INPUTS]  # an output's inputs stay neighbours
                for pair in range(first, last):
                    for half in range(INPUTS):
                        numbers[pair - first, place + half] = w[start + pair * INPUTS + half]
            for pair in range(first, last):
                at, highest = (tile * num_pairs + pair) * PAIR_BYTES, np.uint8(0)
                for i in range(NUMBERS):
                    coded[at + i] = numbers[pair - first, i] & 255
                    found[i] = codes[numbers[pair - first, i] >> 8]
                for i in range(NUMBERS):
                    highest = max(highest, found[i])
                for i in range(CODE_BYTES):
                    coded[at + NUMBERS + i] = found[i] & 15 | found[CODE_BYTES + i] << CODE_BITS
                is_marked[tile, pair] = highest == NO_CODE


@njit(parallel=True, **FAST)
def _copy_marked(w, order, k_size, marks, raw):  # type: ignore[no-untyped-def]
    num_pairs = k_size // INPUTS
    for mark in prange(len(marks)):
        tile, pair = marks[mark] // num_pairs, marks[mark] % num_pairs
        for i in range(NUMBERS):
            raw[mark, i] = _weight(w, order, k_size, tile * OUTPUTS + i // INPUTS, pair * INPUTS + i % INPUTS)
