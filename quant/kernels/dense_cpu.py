"""Dense matrix product on a CPU: float32 activations, weights as stored (bfloat16, float16, float32), float32 sums.

One kernel serves one row and a thousand: each output is eight lanes of fused multiply-adds along `k`, folded by a
fixed tree, in every tile shape, so a row's bits do not depend on how many rows run with it. Few rows are bound by
reading the weights (they are read once for four rows); many rows run at 85-95 % of MKL's float32 speed on AVX2 without
the widened copy of the weights that MKL would need (docs/performance.md has the figures).
"""

from __future__ import annotations

import torch
from numba import njit, prange

from quant.base import PackedWeight
from quant.kernels.arrays import FAST, call, flat_view, new_output
from quant.kernels.simd import LANES, fma, load, prefetch, sum_lanes, zeros

TILE_OUTPUTS = 12
"""Outputs per parallel item: a multiple of the 3 and 4 outputs of the tiles below."""
LONG_STREAM = 2048
"""From this many inputs on the processor's own prefetching is 10 % faster than ours, which evicts what is in use."""
ROW_BLOCK_BYTES = 1 << 18
"""Activations that stay in the L2 cache while a thread walks over its weights."""


@njit(inline="always")
def _tile_1x2(x, x0, w, w0, k_size, bias, n, out, o0):  # type: ignore[no-untyped-def]
    w1 = w0 + k_size
    s0, s1 = zeros(), zeros()
    for k in range(0, k_size - LANES, 2 * LANES):
        prefetch(w, w0 + 2 * (k_size + k))
        a = load(x, x0 + k)
        s0, s1 = fma(a, load(w, w0 + k), s0), fma(a, load(w, w1 + k), s1)
        a = load(x, x0 + k + LANES)
        s0, s1 = fma(a, load(w, w0 + k + LANES), s0), fma(a, load(w, w1 + k + LANES), s1)
    if k_size % (2 * LANES):
        k = k_size - LANES
        a = load(x, x0 + k)
        s0, s1 = fma(a, load(w, w0 + k), s0), fma(a, load(w, w1 + k), s1)
    out[o0] = sum_lanes(s0) + bias[n]
    out[o0 + 1] = sum_lanes(s1) + bias[n + 1]


@njit(inline="always")
def _tile_1x4(x, x0, w, w0, k_size, bias, n, out, o0):  # type: ignore[no-untyped-def]
    w1, w2, w3 = w0 + k_size, w0 + 2 * k_size, w0 + 3 * k_size
    s0, s1, s2, s3 = zeros(), zeros(), zeros(), zeros()
    for k in range(0, k_size, LANES):
        a = load(x, x0 + k)
        s0 = fma(a, load(w, w0 + k), s0)
        s1 = fma(a, load(w, w1 + k), s1)
        s2 = fma(a, load(w, w2 + k), s2)
        s3 = fma(a, load(w, w3 + k), s3)
    out[o0] = sum_lanes(s0) + bias[n]
    out[o0 + 1] = sum_lanes(s1) + bias[n + 1]
    out[o0 + 2] = sum_lanes(s2) + bias[n + 2]
    out[o0 + 3] = sum_lanes(s3) + bias[n + 3]


@njit(inline="always")
def _tile_2x4(x, x0, w, w0, k_size, bias, n, out, o0, n_size):  # type: ignore[no-untyped-def]
    x1 = x0 + k_size
    o1 = o0 + n_size
    w1, w2, w3 = w0 + k_size, w0 + 2 * k_size, w0 + 3 * k_size
    s00, s01, s02, s03 = zeros(), zeros(), zeros(), zeros()
    s10, s11, s12, s13 = zeros(), zeros(), zeros(), zeros()
    for k in range(0, k_size, LANES):
        prefetch(w, w0 + 4 * (k_size + k))
        a = load(x, x0 + k)
        b = load(x, x1 + k)
        c = load(w, w0 + k)
        s00 = fma(a, c, s00)
        s10 = fma(b, c, s10)
        c = load(w, w1 + k)
        s01 = fma(a, c, s01)
        s11 = fma(b, c, s11)
        c = load(w, w2 + k)
        s02 = fma(a, c, s02)
        s12 = fma(b, c, s12)
        c = load(w, w3 + k)
        s03 = fma(a, c, s03)
        s13 = fma(b, c, s13)
    out[o0] = sum_lanes(s00) + bias[n]
    out[o0 + 1] = sum_lanes(s01) + bias[n + 1]
    out[o0 + 2] = sum_lanes(s02) + bias[n + 2]
    out[o0 + 3] = sum_lanes(s03) + bias[n + 3]
    out[o1] = sum_lanes(s10) + bias[n]
    out[o1 + 1] = sum_lanes(s11) + bias[n + 1]
    out[o1 + 2] = sum_lanes(s12) + bias[n + 2]
    out[o1 + 3] = sum_lanes(s13) + bias[n + 3]


@njit(inline="always")
def _tile_4x3(x, x0, w, w0, k_size, bias, n, out, o0, n_size):  # type: ignore[no-untyped-def]
    x1, x2, x3 = x0 + k_size, x0 + 2 * k_size, x0 + 3 * k_size
    o1, o2, o3 = o0 + n_size, o0 + 2 * n_size, o0 + 3 * n_size
    w1, w2 = w0 + k_size, w0 + 2 * k_size
    s00, s01, s02, s10, s11, s12 = zeros(), zeros(), zeros(), zeros(), zeros(), zeros()
    s20, s21, s22, s30, s31, s32 = zeros(), zeros(), zeros(), zeros(), zeros(), zeros()
    for k in range(0, k_size, LANES):
        prefetch(w, w0 + 3 * (k_size + k))
        c0 = load(w, w0 + k)
        c1 = load(w, w1 + k)
        c2 = load(w, w2 + k)
        a = load(x, x0 + k)
        s00, s01, s02 = fma(a, c0, s00), fma(a, c1, s01), fma(a, c2, s02)
        a = load(x, x1 + k)
        s10, s11, s12 = fma(a, c0, s10), fma(a, c1, s11), fma(a, c2, s12)
        a = load(x, x2 + k)
        s20, s21, s22 = fma(a, c0, s20), fma(a, c1, s21), fma(a, c2, s22)
        a = load(x, x3 + k)
        s30, s31, s32 = fma(a, c0, s30), fma(a, c1, s31), fma(a, c2, s32)
    b0, b1, b2 = bias[n], bias[n + 1], bias[n + 2]
    out[o0], out[o0 + 1], out[o0 + 2] = sum_lanes(s00) + b0, sum_lanes(s01) + b1, sum_lanes(s02) + b2
    out[o1], out[o1 + 1], out[o1 + 2] = sum_lanes(s10) + b0, sum_lanes(s11) + b1, sum_lanes(s12) + b2
    out[o2], out[o2 + 1], out[o2 + 2] = sum_lanes(s20) + b0, sum_lanes(s21) + b1, sum_lanes(s22) + b2
    out[o3], out[o3 + 1], out[o3 + 2] = sum_lanes(s30) + b0, sum_lanes(s31) + b1, sum_lanes(s32) + b2


@njit(inline="always")
def _tile_1x1(x, x0, w, w0, k_size, bias, n, out, o0):  # type: ignore[no-untyped-def]
    s = zeros()
    for k in range(0, k_size, LANES):
        s = fma(load(x, x0 + k), load(w, w0 + k), s)
    out[o0] = sum_lanes(s) + bias[n]


@njit(inline="always")
def multiply_tile(x, w, w_first, bias, out, first_row, last_row, first_n, last_n, n_size, k_size):  # type: ignore[no-untyped-def]
    """Rows of x times at most TILE_OUTPUTS rows of w, of which the first lies at `w_first`."""
    row = first_row
    if last_n - first_n < TILE_OUTPUTS:
        for r in range(first_row, last_row):
            for n in range(first_n, last_n):
                _tile_1x1(x, r * k_size, w, w_first + (n - first_n) * k_size, k_size, bias, n, out, r * n_size + n)
        row = last_row
    while row + 4 <= last_row:
        for n in range(first_n, last_n, 3):
            w0 = w_first + (n - first_n) * k_size
            _tile_4x3(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
        row += 4
    if row + 2 <= last_row:
        for n in range(first_n, last_n, 4):
            w0 = w_first + (n - first_n) * k_size
            _tile_2x4(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n, n_size)
        row += 2
    if row < last_row and k_size < LONG_STREAM:
        for n in range(first_n, last_n, 2):
            w0 = w_first + (n - first_n) * k_size
            _tile_1x2(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n)
    elif row < last_row:
        for n in range(first_n, last_n, 4):
            w0 = w_first + (n - first_n) * k_size
            _tile_1x4(x, row * k_size, w, w0, k_size, bias, n, out, row * n_size + n)


@njit(parallel=True, **FAST)
def _product(x, w, bias, out, num_rows, n_size, k_size, row_block):  # type: ignore[no-untyped-def]
    num_tiles = (n_size + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    num_row_blocks = (num_rows + row_block - 1) // row_block
    for item in prange(num_row_blocks * num_tiles):
        first_row = item // num_tiles * row_block
        last_row = min(num_rows, first_row + row_block)
        first_n = item % num_tiles * TILE_OUTPUTS
        last_n = min(n_size, first_n + TILE_OUTPUTS)
        multiply_tile(x, w, first_n * k_size, bias, out, first_row, last_row, first_n, last_n, n_size, k_size)


class DenseCpu:
    """`x @ weight.T + bias`: x [rows, k] float32, weight [n, k] as stored, bias [n] float32 -> [rows, n] float32."""

    rounding = None
    row_counts = ()

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        if packed.num_inputs % LANES:
            return [f"the CPU kernel needs input sizes that are a multiple of {LANES}, not {packed.num_inputs}"]
        return []

    def __init__(self, packed: PackedWeight) -> None:
        weight, bias = packed.weight, packed.bias
        self._n_size, self._k_size = weight.shape
        self._weight = flat_view(weight)
        self._bias = flat_view(torch.zeros(self._n_size) if bias is None else bias.to(torch.float32))
        self._row_block = max(4, ROW_BLOCK_BYTES // (4 * self._k_size) // 4 * 4)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        out, flat_out = new_output(num_rows, self._n_size)
        sizes = num_rows, self._n_size, self._k_size, self._row_block
        call(_product, flat_view(x), self._weight, self._bias, flat_out, *sizes)
        return out
