"""Dense matrix product on a CPU whose factors are bfloat16: activations are rounded to it, sums are float32.

One rule for every number of rows: each number of a row is rounded to the nearest bfloat16, ties to even, and the
products of an output are added in the order of its inputs, of each two the second one first (`bfloat16_ops`). A row's
bits depend neither on how many rows run with it nor on whether the processor has AVX512-BF16.

Weights are put into the order in which a tile reads them once, so that an output is a lane of a register: no sum is
folded, and a tile reads one stream. Rows are cut into the fewest blocks of at most `ROWS`, all but the last alike.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import get_num_threads, njit, prange

from quant.base import MatrixKernel, PackedWeight
from quant.kernels.arrays import FAST, call, flat_view, new_output, new_weight
from quant.kernels.bfloat16_ops import (
    HAS_PAIRS,
    INPUTS,
    INTERLEAVED_PAIRS,
    LANES,
    OUTPUTS,
    ROUNDED,
    ROWS,
    multiply_block,
    round_vector,
)
from quant.kernels.coded_ops import HAS_TABLES, multiply_coded_block
from quant.kernels.coded_weights import CodedWeights, encode
from quant.kernels.gates_ops import count_gates, gate_order
from quant.kernels.padding_cpu import padded, without_padding
from quant.kernels.simd import HAS_AVX512
from quant.kernels.work_split import even_block, fetched_part, new_claims, next_piece, tiles_of_piece

ROW_BLOCK = 22 * ROWS
"""Rows that share a reading of a tile's weights, which stay in the L2 cache, as do rows of 1,024 inputs. Rows of more
come from the L3 in time."""
MAX_INPUTS = 4096
"""Inputs of a stretch: all rows pass it in a tile, their sums wait, then the next. Its weights are 256 KB or, coded,
192, and with as many that are asked for meanwhile they stay in the L2 cache. Those of 18,944 inputs would not."""


@njit(parallel=True, **FAST)
def interleave(w, order, k_size, out):  # type: ignore[no-untyped-def]
    """w uint16 [*, k_size], its rows in `order` -> out uint16 [tiles, pairs, OUTPUTS, 2], which ends in zeros."""
    num_pairs, n_size = k_size // INPUTS, len(order)
    for tile in prange((n_size + OUTPUTS - 1) // OUTPUTS):
        for first in range(0, num_pairs, INTERLEAVED_PAIRS):
            last = min(num_pairs, first + INTERLEAVED_PAIRS)
            for lane in range(OUTPUTS):
                n = tile * OUTPUTS + lane
                row = order[n] if n < n_size else 0
                for pair in range(first, last):
                    at = ((tile * num_pairs + pair) * OUTPUTS + lane) * INPUTS
                    for half in range(INPUTS):
                        out[at + half] = w[row * k_size + pair * INPUTS + half] if n < n_size else 0


@njit(inline="always")
def _round_row(x, row, k_size, rounded):  # type: ignore[no-untyped-def]
    for k in range(row * k_size, (row + 1) * k_size, LANES):
        round_vector(x, k, rounded, k)


@njit(inline="always")
def _multiply_rows(rounded, w, codes, bias, out, waiting, place, rows, tile, sizes):  # type: ignore[no-untyped-def]
    """Rows in blocks times a stretch of a tile.

    `rows` are the first row, the one after the last, how many are a block, and how many blocks share what is asked
    for ahead; `sizes` are gates, width, k_size, first and last input, and the stretch's first mark.
    """
    coded, tables, raw, marks, _ = codes
    start, end, rows_each, num_blocks = rows
    gates, width, k_size, first, last, mark = sizes
    for row in range(start, end, rows_each):
        count = min(rows_each, end - row)
        part, parts = fetched_part((row - start) // rows_each, num_blocks)
        work = place, row, tile, gates, width, k_size, first, last
        if len(coded) > 0:
            multiply_coded_block(rounded, coded, tables, raw, marks, bias, out, waiting, count, work, mark, part, parts)
        else:
            multiply_block(rounded, w, bias, out, waiting, count, work, part, parts)
        place += rows_each * OUTPUTS


@njit(parallel=True, **FAST)
def _product(x, w, codes, bias, out, n_size, gates, width, k_size, inputs_each, num_threads):  # type: ignore[no-untyped-def]
    """x float32 flat [num_rows, k_size] times a matrix of n_size outputs -> out float32 flat.

    Its weights are w, as `interleave` makes them, or `codes`, of `CodedWeights`, with stretches of `inputs_each`.
    `gates` and `width` are those of `gates_ops.write_tile`.
    """
    num_rows = len(x) // k_size
    rounded = np.empty(num_rows * k_size, ROUNDED)
    if num_rows <= ROWS:  # a parallel region takes longer to start
        for row in range(num_rows):
            _round_row(x, row, k_size, rounded)
    else:
        for row in prange(num_rows):
            _round_row(x, row, k_size, rounded)
    rows_each = even_block(num_rows, ROWS, 1)
    row_block = ROW_BLOCK // rows_each * rows_each
    num_stretches = (k_size + inputs_each - 1) // inputs_each
    max_block_rows = even_block(min(num_rows, row_block), row_block, rows_each)
    num_waiting = num_threads * max_block_rows * OUTPUTS if num_stretches > 1 else 0
    waiting = np.empty(num_waiting, np.float32)
    claims, tiles_each = new_claims(num_threads), tiles_of_piece(OUTPUTS * k_size, num_rows, row_block)
    for thread in prange(num_threads):
        place, turn = thread * max_block_rows * OUTPUTS, 0
        while turn >= 0:
            turn, first_tile, last_tile, first_row, end = next_piece(
                claims, thread, turn, num_threads, n_size // OUTPUTS, num_rows, rows_each, row_block, tiles_each
            )
            even = even_block(end - first_row, row_block, rows_each)
            for start in range(first_row, end, even):
                rows = start, min(end, start + even), rows_each, (even - 1) // rows_each + 1
                for tile in range(first_tile, last_tile):
                    for stretch in range(num_stretches):
                        first = stretch * inputs_each
                        last = min(k_size, first + inputs_each)
                        mark = codes.first_marks[tile * num_stretches + stretch] if len(codes.coded) > 0 else 0
                        sizes = gates, width, k_size, first, last, mark
                        _multiply_rows(rounded, w, codes, bias, out, waiting, place, rows, tile, sizes)


class Bfloat16Cpu:
    """`x @ weight.T + bias`: x [rows, k] float32, rounded first, weight [n, k] bfloat16 -> [rows, n] float32."""

    rounding = ("AVX512-BF16" if HAS_PAIRS else "AVX-512") if HAS_AVX512 else None
    row_counts = ()
    _stretch_unit = LANES

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        reasons = []
        if not HAS_AVX512:
            reasons.append("the processor has no AVX-512, without which pairs of bfloat16 are slower than float32")
        if packed.weight.dtype != torch.bfloat16:
            reasons.append(f"weights are {packed.weight.dtype}, not bfloat16")
        if packed.num_inputs % LANES:
            reasons.append(f"input sizes must be a multiple of {LANES}, not {packed.num_inputs}")
        return reasons

    def __init__(self, packed: PackedWeight) -> None:
        self._n_size, self._k_size = packed.weight.shape
        self._padded_size = -(-self._n_size // OUTPUTS) * OUTPUTS
        self.num_gates = count_gates(packed, OUTPUTS)
        order = gate_order(self._n_size, self.num_gates, LANES)
        w, indices = flat_view(packed.weight).view(np.uint16), order.numpy()
        self._inputs_each = even_block(self._k_size, MAX_INPUTS, self._stretch_unit)
        codes = encode(w, indices, self._k_size, self._inputs_each) if HAS_TABLES else None
        interleaved = np.empty(0, np.uint16)
        if codes is None:
            interleaved = new_weight(2 * self._padded_size * self._k_size).view(np.uint16)
            interleave(w, indices, self._k_size, interleaved)
        self._weights = interleaved, codes or CodedWeights.empty()
        bias = torch.zeros(self._n_size) if packed.bias is None else packed.bias.to(torch.float32)
        self._bias = flat_view(padded(bias, self._padded_size))
        self._num_threads = get_num_threads()

    @property
    def is_coded(self) -> bool:
        """Whether a weight is read in 12 bits."""
        return len(self._weights[1].coded) > 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return without_padding(self._multiply(x, self._padded_size), self._n_size)

    def gated(self, x: torch.Tensor, reader: MatrixKernel | None = None) -> torch.Tensor:
        return self._multiply(x, self.num_gates)

    def _multiply(self, x: torch.Tensor, width: int) -> torch.Tensor:
        out, flat_out = new_output(x.shape[0], width)
        sizes = self._padded_size, self.num_gates, width, self._k_size, self._inputs_each, self._num_threads
        call(_product, flat_view(x), *self._weights, self._bias, flat_out, *sizes)
        return out
