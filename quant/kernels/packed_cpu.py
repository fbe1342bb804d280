"""Matrix products with 8- and 4-bit weights on a CPU: float32 activations, weights widened in registers, float32 sums.

A weight is `scale * (q - zero)`, a scale and a zero point for every `group_size` inputs of an output. It is widened as
`fma(q, scale, shift)`, where the shift is `-scale * zero`: exact for 16-bit scales, since their 11 bits times at most 9
bits of `q` or `zero` fit a float32. Offsets that are stored as floats take the place of `scale * zero`, and the weight
is rounded once. The sums then run as those of `dense_cpu`: the result has the bits of the dense kernel on the widened
weights, whatever the number of rows.

One row is bound by reading the weights, and multiplies as it widens. More rows share the widening: a thread writes a
tile of widened weights into a scratch of its own, which stays in its cache, and the dense kernel's tiles read it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import config, get_num_threads, get_thread_id, njit, prange

from quant.base import PackedWeight
from quant.kernels.arrays import FAST, call, flat_view, new_output
from quant.kernels.dense_ops import WIDTH
from quant.kernels.dense_rows import ROW_BLOCK_BYTES, ROWS, TILE_OUTPUTS, multiply_tile
from quant.kernels.packed_ops import add_int4, add_int8
from quant.kernels.packed_ops import splat as wide_splat
from quant.kernels.packed_ops import zeros as wide_zeros
from quant.kernels.simd import (
    LANES,
    fma,
    load_int4_high,
    load_int4_low,
    load_int8,
    load_one,
    prefetch,
    splat,
    store,
    sum_lanes,
)
from quant.kernels.work_split import even_block, new_claims, next_piece, tiles_of_piece
from quant.packing import NIBBLE_CHUNK

MIN_ROW_BLOCK = 48
"""Rows that share one widening of a tile."""


@njit(inline="always")
def _int8_1x4(x, x0, w, w0, k_size, scales, shifts, g0, num_groups, bias, n, out, o0):  # type: ignore[no-untyped-def]
    group_size = k_size // num_groups
    w1, w2, w3 = w0 + k_size, w0 + 2 * k_size, w0 + 3 * k_size
    g1, g2, g3 = g0 + num_groups, g0 + 2 * num_groups, g0 + 3 * num_groups
    s0, s1, s2, s3 = wide_zeros(), wide_zeros(), wide_zeros(), wide_zeros()
    for g in range(num_groups):
        b0, b1 = wide_splat(load_one(scales, g0 + g)), wide_splat(load_one(scales, g1 + g))
        b2, b3 = wide_splat(load_one(scales, g2 + g)), wide_splat(load_one(scales, g3 + g))
        z0, z1 = wide_splat(load_one(shifts, g0 + g)), wide_splat(load_one(shifts, g1 + g))
        z2, z3 = wide_splat(load_one(shifts, g2 + g)), wide_splat(load_one(shifts, g3 + g))
        for k in range(g * group_size, (g + 1) * group_size, WIDTH):
            prefetch(w, w0 + 4 * (k_size + k))
            s0 = add_int8(x, x0 + k, w, w0 + k, b0, z0, s0)
            s1 = add_int8(x, x0 + k, w, w1 + k, b1, z1, s1)
            s2 = add_int8(x, x0 + k, w, w2 + k, b2, z2, s2)
            s3 = add_int8(x, x0 + k, w, w3 + k, b3, z3, s3)
    out[o0] = sum_lanes(s0) + bias[n]
    out[o0 + 1] = sum_lanes(s1) + bias[n + 1]
    out[o0 + 2] = sum_lanes(s2) + bias[n + 2]
    out[o0 + 3] = sum_lanes(s3) + bias[n + 3]


@njit(inline="always")
def _int4_1x4(x, x0, w, w0, k_size, scales, shifts, g0, num_groups, bias, n, out, o0):  # type: ignore[no-untyped-def]
    group_size = k_size // num_groups
    stride = k_size // 2
    w1, w2, w3 = w0 + stride, w0 + 2 * stride, w0 + 3 * stride
    g1, g2, g3 = g0 + num_groups, g0 + 2 * num_groups, g0 + 3 * num_groups
    s0, s1, s2, s3 = wide_zeros(), wide_zeros(), wide_zeros(), wide_zeros()
    for g in range(num_groups):
        b0, b1 = wide_splat(load_one(scales, g0 + g)), wide_splat(load_one(scales, g1 + g))
        b2, b3 = wide_splat(load_one(scales, g2 + g)), wide_splat(load_one(scales, g3 + g))
        z0, z1 = wide_splat(load_one(shifts, g0 + g)), wide_splat(load_one(shifts, g1 + g))
        z2, z3 = wide_splat(load_one(shifts, g2 + g)), wide_splat(load_one(shifts, g3 + g))
        for k in range(g * group_size, (g + 1) * group_size, NIBBLE_CHUNK):
            byte = k // 2
            prefetch(w, w0 + 4 * (stride + byte))
            s0 = add_int4(x, x0 + k, w, w0 + byte, b0, z0, s0)
            s1 = add_int4(x, x0 + k, w, w1 + byte, b1, z1, s1)
            s2 = add_int4(x, x0 + k, w, w2 + byte, b2, z2, s2)
            s3 = add_int4(x, x0 + k, w, w3 + byte, b3, z3, s3)
    out[o0] = sum_lanes(s0) + bias[n]
    out[o0 + 1] = sum_lanes(s1) + bias[n + 1]
    out[o0 + 2] = sum_lanes(s2) + bias[n + 2]
    out[o0 + 3] = sum_lanes(s3) + bias[n + 3]


@njit(inline="always")
def _widen_int8(w, w0, k_size, scales, shifts, g0, num_groups, scratch, s0):  # type: ignore[no-untyped-def]
    group_size = k_size // num_groups
    for g in range(num_groups):
        b, z = splat(load_one(scales, g0 + g)), splat(load_one(shifts, g0 + g))
        for k in range(g * group_size, (g + 1) * group_size, LANES):
            store(scratch, s0 + k, fma(load_int8(w, w0 + k), b, z))


@njit(inline="always")
def _widen_int4(w, w0, k_size, scales, shifts, g0, num_groups, scratch, s0):  # type: ignore[no-untyped-def]
    group_size = k_size // num_groups
    for g in range(num_groups):
        b, z = splat(load_one(scales, g0 + g)), splat(load_one(shifts, g0 + g))
        for k in range(g * group_size, (g + 1) * group_size, NIBBLE_CHUNK):
            store(scratch, s0 + k, fma(load_int4_low(w, w0 + k // 2), b, z))
            store(scratch, s0 + k + LANES, fma(load_int4_high(w, w0 + k // 2), b, z))


def _make_tile(one_row: Any, widen: Any, inputs_per_byte: int, group_unit: int) -> Any:
    """A tile of one of the layouts; a group of inputs that is no multiple of `group_unit` is widened.

    `matrix_n` counts the outputs of the matrices that lie before this one in the same memory.
    """

    @njit(inline="always")
    def multiply(  # type: ignore[no-untyped-def]
        x, w, scales, shifts, bias, out, scratch, first_row, last_row, tile, matrix_n, n_size, k_size, num_groups
    ):
        stride = k_size // inputs_per_byte
        first_n = tile * TILE_OUTPUTS
        last_n = min(n_size, first_n + TILE_OUTPUTS)
        is_full = last_n - first_n == TILE_OUTPUTS and k_size // num_groups % group_unit == 0
        if last_row - first_row == 1 and is_full:
            for n in range(first_n, last_n, 4):
                w0, g0, o0 = (matrix_n + n) * stride, (matrix_n + n) * num_groups, first_row * n_size + n
                x0 = first_row * k_size
                one_row(x, x0, w, w0, k_size, scales, shifts, g0, num_groups, bias, n, out, o0)
        else:
            s0 = get_thread_id() * TILE_OUTPUTS * k_size
            for n in range(first_n, last_n):
                w0, g0, place = (matrix_n + n) * stride, (matrix_n + n) * num_groups, s0 + (n - first_n) * k_size
                widen(w, w0, k_size, scales, shifts, g0, num_groups, scratch, place)
            multiply_tile(x, scratch, s0, bias, out, first_row, last_row, first_n, last_n, n_size, k_size)

    return multiply


multiply_int8 = _make_tile(_int8_1x4, _widen_int8, 1, WIDTH)
multiply_int4 = _make_tile(_int4_1x4, _widen_int4, 2, 1)


@njit(parallel=True, **FAST)
def _product_int8(  # type: ignore[no-untyped-def]
    x, w, scales, shifts, bias, out, scratch, n_size, k_size, num_groups, row_block, num_threads
):
    num_rows, num_tiles = len(x) // k_size, (n_size + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    claims, tiles_each = new_claims(num_threads), tiles_of_piece(TILE_OUTPUTS * k_size, num_rows, row_block)
    for thread in prange(num_threads):
        turn = 0
        while turn >= 0:
            turn, first_tile, last_tile, first_row, end = next_piece(
                claims, thread, turn, num_threads, num_tiles, num_rows, ROWS, row_block, tiles_each
            )
            size = even_block(end - first_row, row_block, ROWS)
            for row in range(first_row, end, size):
                last = min(end, row + size)
                for tile in range(first_tile, last_tile):
                    multiply_int8(
                        x, w, scales, shifts, bias, out, scratch, row, last, tile, 0, n_size, k_size, num_groups
                    )


@njit(parallel=True, **FAST)
def _product_int4(  # type: ignore[no-untyped-def]
    x, w, scales, shifts, bias, out, scratch, n_size, k_size, num_groups, row_block, num_threads
):
    num_rows, num_tiles = len(x) // k_size, (n_size + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    claims, tiles_each = new_claims(num_threads), tiles_of_piece(TILE_OUTPUTS * k_size, num_rows, row_block)
    for thread in prange(num_threads):
        turn = 0
        while turn >= 0:
            turn, first_tile, last_tile, first_row, end = next_piece(
                claims, thread, turn, num_threads, num_tiles, num_rows, ROWS, row_block, tiles_each
            )
            size = even_block(end - first_row, row_block, ROWS)
            for row in range(first_row, end, size):
                last = min(end, row + size)
                for tile in range(first_tile, last_tile):
                    multiply_int4(
                        x, w, scales, shifts, bias, out, scratch, row, last, tile, 0, n_size, k_size, num_groups
                    )


_scratches: dict[int, npt.NDArray[np.float32]] = {}


def thread_scratch(k_size: int) -> npt.NDArray[np.float32]:
    """Memory for a tile of widened weights for every thread; layers run one after the other and share it."""
    size = config.NUMBA_NUM_THREADS * TILE_OUTPUTS * k_size
    if k_size not in _scratches:
        _scratches[k_size] = np.empty(size, dtype=np.float32)
    return _scratches[k_size]


def scales_and_shifts(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """What a stored number is multiplied with, and what is added to it then: float32 [n, groups] both.

    In one dtype, so that a layout has one kernel, whatever its checkpoints store. The kernels read an 8-bit float as
    1/256 of it (`simd.widened_bytes`).
    """
    assert packed.scales is not None and packed.zero_points is not None
    scales, zeros = packed.scales.float(), packed.zero_points
    if packed.layout == "fp8":
        scales = scales * 256
    return scales, -(zeros.float() if zeros.is_floating_point() else scales * zeros)


class PackedCpu:
    """`x @ weight.T + bias` for "int8", "int4" and "fp8": x [rows, k] float32 -> [rows, n] float32."""

    rounding = None
    row_counts = ()

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        return []

    def __init__(self, packed: PackedWeight) -> None:
        self._product = _product_int4 if packed.layout == "int4" else _product_int8
        scales, shifts = scales_and_shifts(packed)
        self._n_size, self._num_groups = scales.shape
        self._k_size = packed.num_inputs
        bias = torch.zeros(self._n_size) if packed.bias is None else packed.bias.to(torch.float32)
        self._weight = tuple(map(flat_view, (packed.weight, scales, shifts, bias)))
        self._input_order = packed.input_order
        self._scratch = thread_scratch(self._k_size)
        self._row_block = max(MIN_ROW_BLOCK, ROW_BLOCK_BYTES // (4 * self._k_size) // ROWS * ROWS)
        self._num_threads = get_num_threads()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._input_order is not None:
            x = x[:, self._input_order]
        out, flat_out = new_output(x.shape[0], self._n_size)
        sizes = self._n_size, self._k_size, self._num_groups, self._row_block, self._num_threads
        call(self._product, flat_view(x), *self._weight, flat_out, self._scratch, *sizes)
        return out
