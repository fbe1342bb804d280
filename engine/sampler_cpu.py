"""Sampling on a CPU: one Numba kernel over all rows, the fast path of `engine.sampler.sample`.

A plain sample reads the row twice: for its best logit, and for the masses of its chunks, of which then only one is
looked at closely. Top-k and top-p find their threshold among the best few, kept in a heap while the row is read.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from numba import njit, prange

from engine.sampler import MIN_TEMPERATURE, uniform
from engine.scheduler import SampledBatch
from engine.types import SamplingParams
from quant.kernels.dense_cpu import flat_view
from quant.kernels.simd import LANES, add, exp, load, max_lanes, max_of, multiply, splat, subtract, sum_lanes, zeros

CHUNK = 512
FIRST_CANDIDATES = 64
"""Top-p looks among this many best tokens first, then among 8 times as many, and so on."""
GREEDY = 0.0
"""The kernel's temperature for greedy rows."""

_FAST: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "cache": True}


@njit(inline="always")
def _exp(value):  # type: ignore[no-untyped-def]
    return max_lanes(exp(splat(value)))


@njit(**_FAST)
def _largest(logits, start, size):  # type: ignore[no-untyped-def]
    best = splat(np.float32(-np.inf))
    whole = size - size % LANES
    for i in range(start, start + whole, LANES):
        best = max_of(best, load(logits, i))
    largest = max_lanes(best)
    for i in range(start + whole, start + size):
        largest = max(largest, logits[i])
    return largest


@njit(**_FAST)
def _mass(logits, start, size, best, scale, least):  # type: ignore[no-untyped-def]
    """Sum of exp((logit - best) * scale) over the logits that are not below `least`."""
    total = np.float64(0.0)
    if least == -np.inf:
        whole = size - size % LANES
        lanes_sum, offset, factor = zeros(), splat(best), splat(scale)
        for i in range(start, start + whole, LANES):
            lanes_sum = add(lanes_sum, exp(multiply(subtract(load(logits, i), offset), factor)))
        total += np.float64(sum_lanes(lanes_sum))
        start, size = start + whole, size - whole
    for i in range(start, start + size):
        if not logits[i] < least:  # so that a NaN counts, and shows in the total
            total += np.float64(_exp((logits[i] - best) * scale))
    return total


@njit(**_FAST)
def _total(logits, start, size, best, scale, least):  # type: ignore[no-untyped-def]
    """The mass of a whole row, chunk by chunk: a float32 sum of a whole vocabulary would be off by 1e-5."""
    total = np.float64(0.0)
    for first in range(0, size, CHUNK):
        total += _mass(logits, start + first, min(CHUNK, size - first), best, scale, least)
    return total


@njit(**_FAST)
def _keep_best(logits, start, size, count):  # type: ignore[no-untyped-def]
    """The `count` largest logits, descending: a heap with the smallest on top, while the row is read."""
    heap = np.sort(logits[start : start + count])
    for i in range(start + count, start + size):
        value = logits[i]
        if value <= heap[0]:
            continue
        hole = 0
        while 2 * hole + 1 < count:
            child = 2 * hole + 1
            if child + 1 < count and heap[child + 1] < heap[child]:
                child += 1
            if heap[child] >= value:
                break
            heap[hole] = heap[child]
            hole = child
        heap[hole] = value
    return np.sort(heap)[::-1]


@njit(**_FAST)
def _threshold(logits, start, size, best, scale, top_k, top_p):  # type: ignore[no-untyped-def]
    """The smallest logit that may be chosen; ties with it may be, too."""
    least = np.float32(-np.inf)
    if 0 < top_k < size:
        least = _keep_best(logits, start, size, top_k)[top_k - 1]
    if top_p >= 1.0:
        return least
    wanted = top_p * _total(logits, start, size, best, scale, least)
    count = min(FIRST_CANDIDATES, size)
    while True:
        candidates = _keep_best(logits, start, size, count)
        reached = np.float64(0.0)
        for value in candidates:
            if value < least:
                return least
            reached += np.float64(_exp((value - best) * scale))
            if reached >= wanted:
                return value
        if count == size:
            return least
        count = min(8 * count, size)


@njit(**_FAST)
def _draw(logits, start, size, best, scale, least, number):  # type: ignore[no-untyped-def]
    """The first token at which the cumulated mass exceeds `number` of the whole; and the whole."""
    num_chunks = (size + CHUNK - 1) // CHUNK
    masses = np.empty(num_chunks, np.float64)
    total = np.float64(0.0)
    for chunk in range(num_chunks):
        first = chunk * CHUNK
        masses[chunk] = _mass(logits, start + first, min(CHUNK, size - first), best, scale, least)
        total += masses[chunk]
    target = number * total
    passed = np.float64(0.0)
    chosen = -1
    for chunk in range(num_chunks):
        if passed + masses[chunk] <= target and chunk < num_chunks - 1:
            passed += masses[chunk]
            continue
        for i in range(chunk * CHUNK, min(size, chunk * CHUNK + CHUNK)):
            if logits[start + i] >= least:
                mass = np.float64(_exp((logits[start + i] - best) * scale))
                if mass > 0.0:
                    chosen = i  # rounding may leave the target a hair above the chunk's end: then its last token
                passed += mass
                if passed > target:
                    break
        if chosen >= 0:
            break
    return chosen, total


@njit(parallel=True, **_FAST)
def _sample_rows(logits, num_rows, size, temperatures, top_ks, top_ps, numbers, tokens, logprobs):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        start = row * size
        best = _largest(logits, start, size)
        temperature = temperatures[row]
        if temperature == GREEDY:
            tokens[row] = 0
            while logits[start + tokens[row]] != best and tokens[row] < size - 1:
                tokens[row] += 1
            total = _total(logits, start, size, best, np.float32(1.0), np.float32(-np.inf))
            logprobs[row] = -np.log(total)
            continue
        scale = np.float32(1.0) / temperature
        least = _threshold(logits, start, size, best, scale, top_ks[row], top_ps[row])
        chosen, total = _draw(logits, start, size, best, scale, least, numbers[row])
        tokens[row] = max(chosen, 0)
        logprobs[row] = np.float64((logits[start + tokens[row]] - best) * scale) - np.log(total)


def sample(logits: torch.Tensor, params: SequenceOf[SamplingParams], positions: SequenceOf[int]) -> SampledBatch:
    """As `engine.sampler.sample`; logits [rows, vocab] float32 on the CPU."""
    num_rows, size = logits.shape
    temperatures = [GREEDY if p.seed is None else max(p.temperature, MIN_TEMPERATURE) for p in params]
    tokens, logprobs = np.empty(num_rows, np.int64), np.empty(num_rows, np.float64)
    _sample_rows(
        flat_view(logits),
        num_rows,
        size,
        np.array(temperatures, np.float32),
        np.array([p.top_k for p in params], np.int64),
        np.array([p.top_p for p in params], np.float64),
        uniform([p.seed or 0 for p in params], positions),
        tokens,
        logprobs,
    )
    return SampledBatch(tokens.tolist(), logprobs.tolist(), np.isfinite(logprobs).tolist())
