"""Grouped products on a CPU: rows of one matrix share the reading of it, and no other matrix is read.

Each kernel is the one for single matrices around the same tiles, so a row's bits are those that the single matrix gives
(`dense_cpu`, `integer_cpu`, `packed_cpu`). The matrices lie one after the other in one memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, prange

from quant.base import PackedWeight, RowGroups
from quant.kernels import packed_cpu
from quant.kernels.amx import COMPILES_AMX
from quant.kernels.arrays import FAST, call, flat_view, new_output
from quant.kernels.dense_cpu import DenseCpu
from quant.kernels.dense_ops import splits_pairs
from quant.kernels.dense_rows import TILE_OUTPUTS, multiply_tile, rows_per_block, split_rows
from quant.kernels.integer_amx_rows import multiply_row_tiles
from quant.kernels.integer_cpu import OUTPUTS, IntegerCpu, multiply_rows
from quant.kernels.packed_cpu import PackedCpu, multiply_int4, multiply_int8, scales_and_shifts
from quant.kernels.padding_cpu import without_padding
from quant.kernels.rounded_rows import round_rows
from quant.kernels.work_split import tile_range


@njit(parallel=True, **FAST)
def _dense(x, w, bias, out, starts, active, n_size, k_size, row_block, num_threads):  # type: ignore[no-untyped-def]
    rows = x
    if splits_pairs(w):
        rows = split_rows(x, len(x) // k_size, k_size)
    num_tiles = (n_size + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    for thread in prange(num_threads):
        for index in range(active[0]):
            matrix = active[1 + index]
            own_bias, last = bias[matrix * n_size :], starts[matrix + 1]
            first_tile, last_tile = tile_range(index, thread, num_threads, num_tiles)
            for tile in range(first_tile, last_tile):
                first_n = tile * TILE_OUTPUTS
                last_n, w0 = min(n_size, first_n + TILE_OUTPUTS), (matrix * n_size + first_n) * k_size
                for row in range(starts[matrix], last, row_block):
                    last_row = min(last, row + row_block)
                    multiply_tile(rows, w, w0, own_bias, out, row, last_row, first_n, last_n, n_size, k_size)


@njit(parallel=True, **FAST)
def _integer(  # type: ignore[no-untyped-def]
    x, group, w, scales, zeros, num_groups, bias, out, starts, active, n_size, k_size, num_threads, min_amx_rows
):
    x8, x_scales, x_sums = round_rows(x, len(x) // k_size, k_size, group, False)
    num_tiles, num_matrices = n_size // OUTPUTS, len(starts) - 1
    w_size, scale_size, zero_size = len(w) // num_matrices, len(scales) // num_matrices, len(zeros) // num_matrices
    for thread in prange(num_threads):
        for index in range(active[0]):
            matrix = active[1 + index]
            w1, s1 = w[matrix * w_size :], scales[matrix * scale_size :]
            z1, b1 = zeros[matrix * zero_size :], bias[matrix * n_size :]
            tiles = tile_range(index, thread, num_threads, num_tiles)
            rows = starts[matrix], starts[matrix + 1]
            if rows[1] - rows[0] < min_amx_rows:
                multiply_rows(
                    x8, x_scales, x_sums, rows, group, w1, s1, z1, num_groups, b1, out, tiles, 0, n_size, k_size
                )
            elif COMPILES_AMX:  # a constant alone: elsewhere Numba compiles nothing of it
                rounding = 0, x_scales, x8, x_scales, x_sums  # of nothing: arrays for their types alone
                how = out, tiles, 0, n_size, k_size, False, rounding
                multiply_row_tiles(x8, x_scales, x_sums, rows, group, w1, s1, z1, num_groups, b1, *how)


@njit(parallel=True, **FAST)
def _packed_int8(  # type: ignore[no-untyped-def]
    x, w, scales, shifts, bias, out, scratch, starts, active, n_size, k_size, num_groups, num_threads
):
    num_tiles = (n_size + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    for thread in prange(num_threads):
        for index in range(active[0]):
            matrix = active[1 + index]
            matrix_n, row, last = matrix * n_size, starts[matrix], starts[matrix + 1]
            b1 = bias[matrix_n:]
            first_tile, last_tile = tile_range(index, thread, num_threads, num_tiles)
            for tile in range(first_tile, last_tile):
                multiply_int8(
                    x, w, scales, shifts, b1, out, scratch, row, last, tile, matrix_n, n_size, k_size, num_groups
                )


@njit(parallel=True, **FAST)
def _packed_int4(  # type: ignore[no-untyped-def]
    x, w, scales, shifts, bias, out, scratch, starts, active, n_size, k_size, num_groups, num_threads
):
    num_tiles = (n_size + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    for thread in prange(num_threads):
        for index in range(active[0]):
            matrix = active[1 + index]
            matrix_n, row, last = matrix * n_size, starts[matrix], starts[matrix + 1]
            b1 = bias[matrix_n:]
            first_tile, last_tile = tile_range(index, thread, num_threads, num_tiles)
            for tile in range(first_tile, last_tile):
                multiply_int4(
                    x, w, scales, shifts, b1, out, scratch, row, last, tile, matrix_n, n_size, k_size, num_groups
                )


def _numbers(groups: RowGroups) -> tuple[Any, Any]:
    return groups.starts.numpy(), groups.active.numpy()


def _biases(matrices: Sequence[PackedWeight]) -> torch.Tensor:
    biases = [torch.zeros(packed.weight.shape[0]) if packed.bias is None else packed.bias for packed in matrices]
    return torch.cat([bias.to(torch.float32) for bias in biases])


def _order_reasons(matrices: Sequence[PackedWeight]) -> list[str]:
    is_ordered = matrices[0].input_order is None
    return [] if is_ordered else ["each matrix has its inputs in an order of its own"]


class GroupedDenseCpu:
    """`DenseCpu` for many matrices."""

    rounding = None
    is_host_driven = False

    @staticmethod
    def why_not(matrices: Sequence[PackedWeight]) -> list[str]:
        return DenseCpu.why_not(matrices[0]) + _order_reasons(matrices)

    def __init__(self, matrices: Sequence[PackedWeight]) -> None:
        self._n_size, self._k_size = matrices[0].weight.shape
        self._weights = flat_view(torch.cat([packed.weight for packed in matrices])), flat_view(_biases(matrices))
        self._row_block = rows_per_block(self._k_size)
        self._num_threads = get_num_threads()

    def __call__(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        out, flat_out = new_output(x.shape[0], self._n_size)
        sizes = self._n_size, self._k_size, self._row_block, self._num_threads
        call(_dense, flat_view(x), *self._weights, flat_out, *_numbers(groups), *sizes)
        return out


class GroupedPackedCpu:
    """`PackedCpu` for many matrices."""

    rounding = None
    is_host_driven = False

    @staticmethod
    def why_not(matrices: Sequence[PackedWeight]) -> list[str]:
        return PackedCpu.why_not(matrices[0]) + _order_reasons(matrices)

    def __init__(self, matrices: Sequence[PackedWeight]) -> None:
        first = matrices[0]
        self._kernel = {"int8": _packed_int8, "fp8": _packed_int8, "int4": _packed_int4}[first.layout]
        numbers = zip(*map(scales_and_shifts, matrices), strict=True)
        scales, shifts = (torch.stack(list(each)) for each in numbers)
        _, self._n_size, num_groups = scales.shape
        self._sizes = self._n_size, first.num_inputs, num_groups, get_num_threads()
        weight = torch.cat([packed.weight for packed in matrices])
        self._weights = *map(flat_view, (weight, scales, shifts)), flat_view(_biases(matrices))
        self._scratch = packed_cpu.thread_scratch(first.num_inputs)

    def __call__(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        out, flat_out = new_output(x.shape[0], self._n_size)
        call(self._kernel, flat_view(x), *self._weights, flat_out, self._scratch, *_numbers(groups), *self._sizes)
        return out


class GroupedIntegerCpu:
    """`IntegerCpu` for many matrices."""

    rounding = IntegerCpu.rounding
    is_host_driven = False

    @staticmethod
    def why_not(matrices: Sequence[PackedWeight]) -> list[str]:
        return IntegerCpu.why_not(matrices[0]) + _order_reasons(matrices)

    def __init__(self, matrices: Sequence[PackedWeight]) -> None:
        self._n_size = matrices[0].weight.shape[0]
        self._padded_size = -(-self._n_size // OUTPUTS) * OUTPUTS
        self._k_size = matrices[0].num_inputs
        kernels = [IntegerCpu(packed) for packed in matrices]
        parts = [kernel.arrays for kernel in kernels]
        self._min_amx_rows = kernels[0].min_amx_rows
        group, *_, num_groups, _ = parts[0]
        weight, scales, zeros, bias = (np.concatenate([part[index] for part in parts]) for index in (1, 2, 3, 5))
        self._before = group, weight, scales, zeros, num_groups, bias
        self._num_threads = get_num_threads()

    def __call__(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        out, flat_out = new_output(x.shape[0], self._padded_size)
        sizes = self._padded_size, self._k_size, self._num_threads, self._min_amx_rows
        call(_integer, flat_view(x), *self._before, flat_out, *_numbers(groups), *sizes)
        return without_padding(out, self._n_size)
