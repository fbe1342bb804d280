"""The operations of experts as Numba kernels: the choice of each token's, rows for each pair, and what comes of them.

What a token's experts say is added in the order of their weights, the largest first, whoever else is in the step.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange

from engine.layers.base import Routing
from quant.base import RowGroups
from quant.kernels.arrays import FAST, call, flat_view, new_fixed, new_output
from quant.kernels.simd import LANES, add, fma, load, multiply, splat, store, zeros


@njit(**FAST)
def _choose(logits, width, num_experts, top_k, is_normalized, scratch, weights, chosen):  # type: ignore[no-untyped-def]
    """The likeliest experts of each row, of equals the first."""
    for row in range(len(chosen) // top_k):
        l0, p0, c0 = row * width, row * num_experts, row * top_k
        top = logits[l0]
        for e in range(1, num_experts):
            top = max(top, logits[l0 + e])
        total = np.float32(0.0)
        for e in range(num_experts):
            scratch[p0 + e] = np.float32(math.exp(logits[l0 + e] - top))
            total = np.float32(total + scratch[p0 + e])
        share = np.float32(0.0)
        for i in range(top_k):
            best = 0
            for e in range(1, num_experts):
                if scratch[p0 + e] > scratch[p0 + best]:
                    best = e
            chosen[c0 + i] = best
            weights[c0 + i] = scratch[p0 + best] / total
            share = np.float32(share + weights[c0 + i])
            scratch[p0 + best] = np.float32(-1.0)
        if is_normalized:
            for i in range(top_k):
                weights[c0 + i] = weights[c0 + i] / share


@njit(**FAST)
def _group(chosen, top_k, num_experts, starts, active, matrices, tokens, places):  # type: ignore[no-untyped-def]
    """Sort by expert; tokens of one expert stay in their order."""
    for e in range(num_experts + 1):
        starts[e] = 0
    for i in range(len(chosen)):
        starts[chosen[i] + 1] += 1
    active[0] = 0
    for e in range(num_experts):
        if starts[e + 1]:
            active[0] += 1
            active[active[0]] = e
        starts[e + 1] += starts[e]
    for i in range(len(chosen)):
        place = starts[chosen[i]]
        starts[chosen[i]] += 1
        matrices[place], tokens[place], places[i] = chosen[i], i // top_k, place
    for e in range(num_experts, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0


@njit(inline="always")
def _mix_row(outputs, places, weights, first, top_k, size, out, target):  # type: ignore[no-untyped-def]
    for i in range(0, size, LANES):
        total = zeros()
        for k in range(first, first + top_k):
            total = fma(load(outputs, places[k] * size + i), splat(weights[k]), total)
        store(out, target + i, total)


@njit(parallel=True, **FAST)
def _mix(outputs, places, weights, top_k, size, out):  # type: ignore[no-untyped-def]
    for row in prange(len(out) // size):
        _mix_row(outputs, places, weights, row * top_k, top_k, size, out, row * size)


@njit(parallel=True, **FAST)
def _add_gated(x, y, logits, width, column, size):  # type: ignore[no-untyped-def]
    for row in prange(len(x) // size):
        gate = splat(np.float32(1.0 / (1.0 + math.exp(-logits[row * width + column]))))
        for i in range(row * size, (row + 1) * size, LANES):
            store(x, i, add(load(x, i), multiply(gate, load(y, i))))


class CpuExpertOps:
    """The part of `base.Ops` that only models with experts call, on float32 tensors as `CpuOps` takes them."""

    def route(self, logits: torch.Tensor, num_experts: int, top_k: int, *, is_normalized: bool) -> Routing:
        num_rows, width = logits.shape
        scratch, weights = new_output(num_rows, num_experts)[1], new_output(num_rows, top_k)[0]
        chosen, matrices, tokens, places = (_integers(num_rows, top_k) for _ in range(4))
        starts, active = (new_fixed(num_experts + 1).view(torch.int32) for _ in range(2))
        sizes = width, num_experts, top_k, int(is_normalized)
        call(_choose, flat_view(logits), *sizes, scratch, flat_view(weights), chosen.numpy())
        grouped = starts, active, matrices, tokens, places
        call(_group, chosen.numpy(), top_k, num_experts, *(numbers.numpy() for numbers in grouped))
        return Routing(RowGroups(*grouped[:4]), places.view(num_rows, top_k), weights)

    def mix(self, outputs: torch.Tensor, routing: Routing) -> torch.Tensor:
        num_rows, top_k = routing.places.shape
        size = outputs.shape[1]
        out, flat_out = new_output(num_rows, size)
        pairs = flat_view(routing.places), flat_view(routing.weights)
        call(_mix, flat_view(outputs), *pairs, top_k, size, flat_out)
        return out

    def add_gated(self, x: torch.Tensor, y: torch.Tensor, logits: torch.Tensor, column: int) -> torch.Tensor:
        call(_add_gated, flat_view(x), flat_view(y), flat_view(logits), logits.shape[1], column, x.shape[1])
        return x


def _integers(num_rows: int, size: int) -> torch.Tensor:
    """An uninitialised tensor [num_rows * size] int32."""
    return new_output(num_rows, size)[0].view(-1).view(torch.int32)
