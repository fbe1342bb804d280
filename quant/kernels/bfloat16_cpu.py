"""Dense matrix product on a CPU whose factors are bfloat16: activations are rounded to it, sums are float32.

One rule for every number of rows: each number of a row is rounded to the nearest bfloat16, ties to even, and the
products of an output are added in the order of its inputs, of each two the second one first (`bfloat16_ops`). A row's
bits depend neither on how many rows run with it nor on whether the processor has AVX512-BF16.

Weights are put into the order in which a tile reads them once, so that an output is a lane of a register: no sum is
folded, and a tile reads one stream. Rows are cut into the fewest blocks of at most `ROWS`, all but the last alike, and
the activations of a block are put side by side, pair by pair.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import get_num_threads, njit, prange

from quant.base import PackedWeight
from quant.kernels.arrays import FAST, call, flat_view, new_output
from quant.kernels.bfloat16_ops import ACTIVATION, HAS_PAIRS, INPUTS, OUTPUTS, ROWS, multiply_block
from quant.kernels.padding_cpu import padded, without_padding
from quant.kernels.simd import HAS_AVX512, load16, store
from quant.kernels.work_split import NUM_RECTANGLES, even_block, fetched_part, rectangle

ROW_BLOCK = 43 * ROWS
"""Rows that share a reading of a tile's weights, which stay in the L2 cache; activations come from the L3 in time."""
ROUNDED_AT_A_TIME = 16
"""The number of inputs is a multiple of it."""
INTERLEAVED_PAIRS = 16
"""Pairs of an output's inputs that are moved at a time: a cache line. What is written stays in the cache meanwhile."""


@njit(parallel=True, **FAST)
def interleave(w, n_size, k_size, out):  # type: ignore[no-untyped-def]
    """w uint16 [n_size, k_size] -> out uint16 [tiles, pairs, OUTPUTS, 2]; outputs that w has not are zeros."""
    num_pairs = k_size // INPUTS
    for tile in prange((n_size + OUTPUTS - 1) // OUTPUTS):
        for first in range(0, num_pairs, INTERLEAVED_PAIRS):
            last = min(num_pairs, first + INTERLEAVED_PAIRS)
            for lane in range(OUTPUTS):
                n = tile * OUTPUTS + lane
                for pair in range(first, last):
                    at = ((tile * num_pairs + pair) * OUTPUTS + lane) * INPUTS
                    for half in range(INPUTS):
                        out[at + half] = w[n * k_size + pair * INPUTS + half] if n < n_size else 0


@njit(inline="always")
def _round_row(x, row, k_size):  # type: ignore[no-untyped-def]
    """A row of x float32 [*, k_size] as bfloat16."""
    rounded = np.empty(k_size, np.uint16)
    for k in range(0, k_size, ROUNDED_AT_A_TIME):
        store(rounded, k, load16(x, row * k_size + k))
    return rounded


@njit(inline="always")
def _words_of(rounded):  # type: ignore[no-untyped-def]
    """The numbers of a row, uint16, as words: each has the first of a pair in its lower half."""
    return rounded.view(np.uint32)


@njit(inline="always")
def _floats_of(rounded):  # type: ignore[no-untyped-def]
    """The numbers of a row, uint16, as float32."""
    floats = np.empty(len(rounded), np.float32)
    for k in range(0, len(rounded), ROUNDED_AT_A_TIME):
        store(floats, k, load16(rounded, k))
    return floats


_numbers_of = _words_of if HAS_PAIRS else _floats_of


@njit(**FAST)
def _round_block(x, row, rows, k_size, rounded):  # type: ignore[no-untyped-def]
    """Write `rows` rows of x float32 flat [*, k_size] to `rounded`, as `multiply_block` takes them.

    Their block begins as many numbers from the start as all rows before them have. It is words [k_size / 2, rows], or
    float32 [k_size, rows] without AVX512-BF16.
    """
    for r in range(rows):
        numbers = _numbers_of(_round_row(x, row + r, k_size))
        first = row * len(numbers) + r
        for i in range(len(numbers)):
            rounded[first + i * rows] = numbers[i]


@njit(parallel=True, **FAST)
def _product(x, w, bias, out, num_rows, n_size, k_size, num_threads):  # type: ignore[no-untyped-def]
    """x float32 flat [num_rows, k_size] times w, as `interleave` makes it -> out float32 flat [num_rows, n_size]."""
    numbers = k_size // INPUTS if HAS_PAIRS else k_size
    rounded = np.empty(num_rows * numbers, ACTIVATION)
    rows_each = even_block(num_rows, ROWS, 1)
    num_blocks = (num_rows + rows_each - 1) // rows_each
    if num_blocks == 1:  # a parallel region takes longer to start
        _round_block(x, 0, num_rows, k_size, rounded)
    else:
        for block in prange(num_blocks):
            first = block * rows_each
            _round_block(x, first, min(rows_each, num_rows - first), k_size, rounded)
    row_block = ROW_BLOCK // rows_each * rows_each
    for item in prange(num_threads * NUM_RECTANGLES):
        thread, index = item // NUM_RECTANGLES, item % NUM_RECTANGLES
        first_tile, last_tile, first_row, end = rectangle(
            index, thread, num_threads, n_size // OUTPUTS, num_rows, rows_each
        )
        even = even_block(end - first_row, row_block, rows_each)
        for start in range(first_row, end, even):
            for tile in range(first_tile, last_tile):
                for row in range(start, min(end, start + even), rows_each):
                    rows = min(rows_each, num_rows - row)
                    part, parts = fetched_part((row - start) // rows_each, (even - 1) // rows_each + 1)
                    multiply_block(rounded, row * numbers, w, bias, out, row, rows, tile, n_size, k_size, part, parts)


class Bfloat16Cpu:
    """`x @ weight.T + bias`: x [rows, k] float32, rounded first, weight [n, k] bfloat16 -> [rows, n] float32."""

    rounding = ("AVX512-BF16" if HAS_PAIRS else "AVX-512") if HAS_AVX512 else None
    row_counts = ()

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        reasons = []
        if not HAS_AVX512:
            reasons.append("the processor has no AVX-512, without which pairs of bfloat16 are slower than float32")
        if packed.weight.dtype != torch.bfloat16:
            reasons.append(f"weights are {packed.weight.dtype}, not bfloat16")
        if packed.num_inputs % ROUNDED_AT_A_TIME:
            reasons.append(f"input sizes must be a multiple of {ROUNDED_AT_A_TIME}, not {packed.num_inputs}")
        return reasons

    def __init__(self, packed: PackedWeight) -> None:
        self._n_size, self._k_size = packed.weight.shape
        self._padded_size = -(-self._n_size // OUTPUTS) * OUTPUTS
        self._weight = np.empty(self._padded_size * self._k_size, np.uint16)
        interleave(flat_view(packed.weight), self._n_size, self._k_size, self._weight)
        bias = torch.zeros(self._n_size) if packed.bias is None else packed.bias.to(torch.float32)
        self._bias = flat_view(padded(bias, self._padded_size))
        self._num_threads = get_num_threads()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        out, flat_out = new_output(num_rows, self._padded_size)
        sizes = num_rows, self._padded_size, self._k_size, self._num_threads
        call(_product, flat_view(x), self._weight, self._bias, flat_out, *sizes)
        return without_padding(out, self._n_size)
