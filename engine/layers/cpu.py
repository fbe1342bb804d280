"""The operations as Numba kernels. A few rows run on the calling thread: starting a parallel region costs 5 us."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit, prange

from engine.layers.base import FEW_ROWS, Rotation
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


@njit(**FAST)
def _look_up(table, num_rows, size, token_ids, out):  # type: ignore[no-untyped-def]
    """A token that the table does not have gets NaN, which ends its request."""
    for i in range(len(token_ids)):
        is_known = 0 <= token_ids[i] < num_rows
        for j in range(0, size, LANES):
            value = load(table, token_ids[i] * size + j) if is_known else splat(np.float32(np.nan))
            store(out, i * size + j, value)


@njit(**FAST)
def _add(residual, x, size):  # type: ignore[no-untyped-def]
    for i in range(0, size, LANES):
        store(residual, i, add(load(residual, i), load(x, i)))


@njit(**FAST)
def _norm_serial(x, num_rows, size, weight, eps, out):  # type: ignore[no-untyped-def]
    for row in range(num_rows):
        _norm_row(x, row * size, size, weight, 0, eps, out)


@njit(parallel=True, **FAST)
def _norm_parallel(x, num_rows, size, weight, eps, out):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        _norm_row(x, row * size, size, weight, 0, eps, out)


@njit(**FAST)
def _add_norm_serial(residual, x, num_rows, size, weight, eps, out):  # type: ignore[no-untyped-def]
    for row in range(num_rows):
        _add_norm_row(residual, x, row * size, size, weight, eps, out)


@njit(parallel=True, **FAST)
def _add_norm_parallel(residual, x, num_rows, size, weight, eps, out):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        _add_norm_row(residual, x, row * size, size, weight, eps, out)


@njit(**FAST)
def _norm_heads_serial(qkv, num_rows, width, num_heads, size, weight, eps):  # type: ignore[no-untyped-def]
    for row in range(num_rows):
        _norm_heads_row(qkv, row * width, num_heads, size, weight, eps)


@njit(parallel=True, **FAST)
def _norm_heads_parallel(qkv, num_rows, width, num_heads, size, weight, eps):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        _norm_heads_row(qkv, row * width, num_heads, size, weight, eps)


@njit(**FAST)
def _silu_serial(gate_up, num_rows, size, out):  # type: ignore[no-untyped-def]
    for row in range(num_rows):
        _silu_row(gate_up, row, 0, size, size, out)


@njit(parallel=True, **FAST)
def _silu_parallel(gate_up, num_rows, size, out):  # type: ignore[no-untyped-def]
    num_pieces = (size + PIECE - 1) // PIECE
    for item in prange(num_rows * num_pieces):
        first = item % num_pieces * PIECE
        _silu_row(gate_up, item // num_pieces, first, min(size, first + PIECE), size, out)


@njit(**FAST)
def _rotate_serial(qkv, num_rows, width, num_heads, half, cos, sin, positions):  # type: ignore[no-untyped-def]
    for row in range(num_rows):
        _rotate_row(qkv, row * width, num_heads, half, cos, sin, positions[row] * half)


@njit(parallel=True, **FAST)
def _rotate_parallel(qkv, num_rows, width, num_heads, half, cos, sin, positions):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        _rotate_row(qkv, row * width, num_heads, half, cos, sin, positions[row] * half)


def _pick(serial: Any, parallel: Any, num_elements: int) -> Any:
    return serial if num_elements < PARALLEL_ELEMENTS else parallel


class CpuOps(CpuExpertOps):
    """`base.Ops` on float32 tensors whose row sizes are multiples of 8, those of heads aside."""

    def look_up(self, table: torch.Tensor, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        num_rows, size = table.shape
        if (len(token_ids) > FEW_ROWS and len(token_ids) * size >= PARALLEL_ELEMENTS) or size % LANES:
            return table[token_ids].to(dtype)
        out, flat_out = new_output(len(token_ids), size)
        call(_look_up, flat_view(table), num_rows, size, token_ids.numpy(), flat_out)
        return out

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if len(residual) > FEW_ROWS and residual.numel() >= PARALLEL_ELEMENTS:
            return residual.add_(x)
        call(_add, flat_view(residual), flat_view(x), residual.numel())
        return residual

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, flat_out = new_output(*x.shape)
        kernel = _pick(_norm_serial, _norm_parallel, x.numel())
        call(kernel, flat_view(x), x.shape[0], x.shape[1], flat_view(weight), np.float32(eps), flat_out)
        return out

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, flat_out = new_output(*x.shape)
        kernel = _pick(_add_norm_serial, _add_norm_parallel, x.numel())
        sizes = x.shape[0], x.shape[1]
        call(kernel, flat_view(residual), flat_view(x), *sizes, flat_view(weight), np.float32(eps), flat_out)
        return out

    def norm_heads(self, qkv: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        num_heads, size = weight.shape
        if size % LANES:
            return TorchOps().norm_heads(qkv, weight, eps)
        kernel = _pick(_norm_heads_serial, _norm_heads_parallel, qkv.numel())
        sizes = qkv.shape[0], qkv.shape[1], num_heads, size
        call(kernel, flat_view(qkv), *sizes, flat_view(weight), np.float32(eps))

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out, flat_out = new_output(num_rows, size)
        kernel = _pick(_silu_serial, _silu_parallel, gate_up.numel())
        call(kernel, flat_view(gate_up), num_rows, size, flat_out)
        return out

    def rotate(self, qkv: torch.Tensor, rotation: Rotation, num_heads: int) -> None:
        num_rows, width = qkv.shape
        table = rotation.table
        kernel = _pick(_rotate_serial, _rotate_parallel, qkv.numel())
        angles = flat_view(table.cos), flat_view(table.sin)
        call(kernel, flat_view(qkv), num_rows, width, num_heads, table.cos.shape[1], *angles, rotation.rows.numpy())
