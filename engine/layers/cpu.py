"""The operations as Numba kernels. A few rows run on the calling thread: starting a parallel region costs 5 us.

A kernel is told by the sizes of its arrays how many rows there are, and chooses between one thread and all itself: so
one recorded call serves any number of rows (`quant.kernels.program_cpu`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange

from engine.layers.base import Rotation
from engine.layers.experts_cpu import CpuExpertOps
from engine.layers.torch import TorchOps
from quant.kernels.arrays import FAST, call, flat_view, new_output
from quant.kernels.gates_ops import gated
from quant.kernels.simd import (
    LANES,
    add,
    fma,
    load,
    load16,
    multiply,
    splat,
    store,
    subtract,
    sum_lanes,
    zeros,
)

PARALLEL_ELEMENTS = 1 << 15
"""Work below this many elements is not worth a parallel region."""
PIECE = 1024
"""Elements of a row that one thread computes, where a row has no sum: few rows have work for many threads."""


@njit(inline="always")
def _norm_row(x, start, size, weight, w0, eps, out):  # type: ignore[no-untyped-def]
    total = zeros()
    for i in range(start, start + size, LANES):
        value = load(x, i)
        total = fma(value, value, total)
    mean = sum_lanes(total) / np.float32(size)
    scale = splat(np.float32(1.0) / np.float32(math.sqrt(mean + eps)))
    for i in range(0, size, LANES):
        store(out, start + i, multiply(multiply(load(x, start + i), scale), load(weight, w0 + i)))


@njit(inline="always")
def _norm_heads_row(qkv, start, num_heads, size, weight, eps):  # type: ignore[no-untyped-def]
    for head in range(num_heads):
        _norm_row(qkv, start + head * size, size, weight, head * size, eps, qkv)


@njit(inline="always")
def _add_norm_row(residual, x, start, size, weight, eps, out):  # type: ignore[no-untyped-def]
    for i in range(start, start + size, LANES):
        store(residual, i, add(load(residual, i), load(x, i)))
    _norm_row(residual, start, size, weight, 0, eps, out)


@njit(inline="always")
def _silu_row(gate_up, row, first, last, size, out):  # type: ignore[no-untyped-def]
    gate, up, target = row * 2 * size, row * 2 * size + size, row * size
    rest = last - (last - first) % (2 * LANES)
    for i in range(first, rest, 2 * LANES):
        store(out, target + i, gated(load16(gate_up, gate + i), load16(gate_up, up + i)))
    for i in range(rest, last, LANES):
        store(out, target + i, gated(load(gate_up, gate + i), load(gate_up, up + i)))


@njit(inline="always")
def _rotate_row(qkv, start, num_heads, half, cos, sin, angle):  # type: ignore[no-untyped-def]
    for head in range(num_heads):
        first = start + head * 2 * half
        rest = half - half % LANES
        for i in range(0, rest, LANES):
            cosines, sines = load(cos, angle + i), load(sin, angle + i)
            left, right = load(qkv, first + i), load(qkv, first + half + i)
            store(qkv, first + i, subtract(multiply(left, cosines), multiply(right, sines)))
            store(qkv, first + half + i, add(multiply(right, cosines), multiply(left, sines)))
        for i in range(rest, half):
            c, s = cos[angle + i], sin[angle + i]
            a, b = qkv[first + i], qkv[first + half + i]
            qkv[first + i] = a * c - b * s
            qkv[first + half + i] = b * c + a * s


@njit(inline="always")
def _look_up_row(table, num_known, size, token_id, out, target):  # type: ignore[no-untyped-def]
    is_known = 0 <= token_id < num_known
    for j in range(0, size, LANES):
        value = load(table, token_id * size + j) if is_known else splat(np.float32(np.nan))
        store(out, target + j, value)


@njit(inline="always")
def _add_piece(residual, x, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last, LANES):
        store(residual, i, add(load(residual, i), load(x, i)))


@njit(parallel=True, **FAST)
def _look_up(table, size, token_ids, out):  # type: ignore[no-untyped-def]
    """A token that the table does not have gets NaN, which ends its request."""
    num_known = len(table) // size
    if len(out) < PARALLEL_ELEMENTS:
        for i in range(len(token_ids)):
            _look_up_row(table, num_known, size, token_ids[i], out, i * size)
    else:
        for i in prange(len(token_ids)):
            _look_up_row(table, num_known, size, token_ids[i], out, i * size)


@njit(inline="always")
def _copy_row(x, source, size, out, target):  # type: ignore[no-untyped-def]
    for i in range(0, size, LANES):
        store(out, target + i, load(x, source + i))


@njit(parallel=True, **FAST)
def _take_rows(x, rows, size, out):  # type: ignore[no-untyped-def]
    """x flat [*, size] -> out flat [n, size], the rows `rows` [n]."""
    if len(out) < PARALLEL_ELEMENTS:
        for i in range(len(rows)):
            _copy_row(x, rows[i] * size, size, out, i * size)
    else:
        for i in prange(len(rows)):
            _copy_row(x, rows[i] * size, size, out, i * size)


@njit(parallel=True, **FAST)
def _add(residual, x):  # type: ignore[no-untyped-def]
    size = len(residual)
    if size < PARALLEL_ELEMENTS:
        _add_piece(residual, x, 0, size)
    else:
        for piece in prange((size + PIECE - 1) // PIECE):
            _add_piece(residual, x, piece * PIECE, min(size, (piece + 1) * PIECE))


@njit(parallel=True, **FAST)
def _norm(x, size, weight, eps, out):  # type: ignore[no-untyped-def]
    num_rows = len(x) // size
    if len(x) < PARALLEL_ELEMENTS:
        for row in range(num_rows):
            _norm_row(x, row * size, size, weight, 0, eps, out)
    else:
        for row in prange(num_rows):
            _norm_row(x, row * size, size, weight, 0, eps, out)


@njit(parallel=True, **FAST)
def _add_norm(residual, x, size, weight, eps, out):  # type: ignore[no-untyped-def]
    num_rows = len(x) // size
    if len(x) < PARALLEL_ELEMENTS:
        for row in range(num_rows):
            _add_norm_row(residual, x, row * size, size, weight, eps, out)
    else:
        for row in prange(num_rows):
            _add_norm_row(residual, x, row * size, size, weight, eps, out)


@njit(parallel=True, **FAST)
def _norm_heads(qkv, width, num_heads, size, weight, eps):  # type: ignore[no-untyped-def]
    num_rows = len(qkv) // width
    if len(qkv) < PARALLEL_ELEMENTS:
        for row in range(num_rows):
            _norm_heads_row(qkv, row * width, num_heads, size, weight, eps)
    else:
        for row in prange(num_rows):
            _norm_heads_row(qkv, row * width, num_heads, size, weight, eps)


@njit(parallel=True, **FAST)
def _silu(gate_up, size, out):  # type: ignore[no-untyped-def]
    num_rows, num_pieces = len(out) // size, (size + PIECE - 1) // PIECE
    if len(gate_up) < PARALLEL_ELEMENTS:
        for row in range(num_rows):
            _silu_row(gate_up, row, 0, size, size, out)
    else:
        for item in prange(num_rows * num_pieces):
            first = item % num_pieces * PIECE
            _silu_row(gate_up, item // num_pieces, first, min(size, first + PIECE), size, out)


@njit(parallel=True, **FAST)
def _rotate(qkv, width, num_heads, half, cos, sin, positions):  # type: ignore[no-untyped-def]
    if len(qkv) < PARALLEL_ELEMENTS:
        for row in range(len(positions)):
            _rotate_row(qkv, row * width, num_heads, half, cos, sin, positions[row] * half)
    else:
        for row in prange(len(positions)):
            _rotate_row(qkv, row * width, num_heads, half, cos, sin, positions[row] * half)


class CpuOps(CpuExpertOps):
    """`base.Ops` on float32 tensors whose row sizes are multiples of 8, those of heads aside."""

    def look_up(self, table: torch.Tensor, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        size = table.shape[1]
        if size % LANES:
            return table[token_ids].to(dtype)
        out, flat_out = new_output(len(token_ids), size)
        call(_look_up, flat_view(table), size, token_ids.numpy(), flat_out)
        return out

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        size = x.shape[1]
        if size % LANES:
            return x[rows]
        out, flat_out = new_output(len(rows), size)
        call(_take_rows, flat_view(x), rows.numpy(), size, flat_out)
        return out

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        call(_add, flat_view(residual), flat_view(x))
        return residual

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, flat_out = new_output(*x.shape)
        call(_norm, flat_view(x), x.shape[1], flat_view(weight), np.float32(eps), flat_out)
        return out

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, flat_out = new_output(*x.shape)
        call(_add_norm, flat_view(residual), flat_view(x), x.shape[1], flat_view(weight), np.float32(eps), flat_out)
        return out

    def norm_heads(self, qkv: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        num_heads, size = weight.shape
        if size % LANES:
            return TorchOps().norm_heads(qkv, weight, eps)
        call(_norm_heads, flat_view(qkv), qkv.shape[1], num_heads, size, flat_view(weight), np.float32(eps))

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        size = gate_up.shape[1] // 2
        out, flat_out = new_output(gate_up.shape[0], size)
        call(_silu, flat_view(gate_up), size, flat_out)
        return out

    def rotate(self, qkv: torch.Tensor, rotation: Rotation, num_heads: int) -> None:
        table = rotation.table
        sizes = qkv.shape[1], num_heads, table.cos.shape[1]
        call(_rotate, flat_view(qkv), *sizes, flat_view(table.cos), flat_view(table.sin), rotation.rows.numpy())
