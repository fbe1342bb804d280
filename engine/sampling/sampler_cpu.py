"""Sampling on a CPU: one Numba kernel over all rows, the fast path of `engine.sampling.sampler_torch`.

A plain sample reads the row twice: for its best logit, and for the masses of its chunks, of which then only one is
looked at closely. Every filter leaves the tokens whose logits lie between two bounds: top-k, top-p and min-p set the
lower one, which is found among the best few, kept in a heap while the row is read; typical-p sets both. Logprobs of the
model's own distribution take another look at the row, or at its copy, where it is not the one that was drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from numba import njit, prange

from engine.link.messages import SamplingParams
from engine.sampling.sampler import MIN_TEMPERATURE, RawRows, log_min_p, uniform
from engine.scheduling.batch import SampledBatch
from quant.kernels.dense_cpu import flat_view
from quant.kernels.simd import LANES, add, exp, load, max_lanes, max_of, multiply, splat, subtract, sum_lanes, zeros

CHUNK = 512
FIRST_CANDIDATES = 64
"""Top-p looks among this many best tokens first, then among 8 times as many, and so on."""
NUM_BINS = 4096
"""Of distances from the entropy, for typical-p."""
GREEDY = 0.0
"""The kernel's temperature for greedy rows."""
LEAST, MOST = np.float32(-np.inf), np.float32(np.inf)
"""The bounds of allowed logits where nothing is filtered."""
LEAST_FINITE = np.finfo(np.float32).min

WANTED = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("log_min_p", np.float32),
        ("typical_p", np.float64),
        ("number", np.float64),  # in [0, 1): what is drawn
        ("num_top", np.int64),
        ("is_filtered", np.int64),  # logprobs are of the distribution drawn from
        ("raw_row", np.int64),  # of the row among the copies, -1: it is not there
    ],
    align=True,
)
"""What a row asks for."""
RESULT = np.dtype(
    [
        ("token", np.int64),
        ("logprob", np.float64),
        ("is_finite", np.int64),
        # The reported distribution, for the top tokens: exp((logit - best) * scale) / total of what is in the bounds.
        ("best", np.float32),
        ("scale", np.float32),
        ("log_total", np.float64),
        ("least", np.float32),
        ("most", np.float32),
        ("num_listed", np.int64),
    ],
    align=True,
)

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
def _mass(logits, start, size, best, scale, least, most):  # type: ignore[no-untyped-def]
    """Sum of exp((logit - best) * scale) over the logits that are not below `least` and not above `most`."""
    total = np.float64(0.0)
    if least == LEAST and most == MOST:
        whole = size - size % LANES
        lanes_sum, offset, factor = zeros(), splat(best), splat(scale)
        for i in range(start, start + whole, LANES):
            lanes_sum = add(lanes_sum, exp(multiply(subtract(load(logits, i), offset), factor)))
        total += np.float64(sum_lanes(lanes_sum))
        start, size = start + whole, size - whole
    for i in range(start, start + size):
        if not logits[i] < least and not logits[i] > most:  # so that a NaN counts, and shows in the total
            total += np.float64(_exp((logits[i] - best) * scale))
    return total


@njit(**_FAST)
def _total(logits, start, size, best, scale, least, most):  # type: ignore[no-untyped-def]
    """The mass of a whole row, chunk by chunk: a float32 sum of a whole vocabulary would be off by 1e-5."""
    total = np.float64(0.0)
    for first in range(0, size, CHUNK):
        total += _mass(logits, start + first, min(CHUNK, size - first), best, scale, least, most)
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
    wanted = top_p * _total(logits, start, size, best, scale, least, MOST)
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
def _typical_bounds(logits, start, size, best, scale, least, typical_p):  # type: ignore[no-untyped-def]
    """The smallest and the largest logit of the tokens whose surprise is nearest to the entropy.

    For scaled logits z with normaliser log t, a token's surprise is log t - z and the entropy log t - E[z]: they are
    |z - E[z]| apart, so that what is allowed lies between two logits. Masses are added up in bins of that distance, and
    only the bin in which they reach `typical_p` is sorted.
    """
    masses = np.zeros(size, np.float32)
    total = weighted = np.float64(0.0)
    for i in range(size):
        if logits[start + i] >= least:
            z = (logits[start + i] - best) * scale
            masses[i] = _exp(z)
            if masses[i] > 0.0:
                total += masses[i]
                weighted += np.float64(masses[i]) * z
    if not total > 0.0:  # no number can be drawn, and the draw will say so
        return least, MOST
    centre = np.float32(weighted / total)
    distances = np.abs((logits[start : start + size] - best) * scale - centre)
    distances[masses == 0.0] = np.float32(0.0)  # they have no part in anything
    per_unit = np.float32(NUM_BINS - 1) / max(distances.max(), np.float32(1e-30))
    bins = np.zeros(NUM_BINS, np.float64)
    for i in range(size):
        bins[np.int64(distances[i] * per_unit)] += masses[i]
    reached = np.float64(0.0)
    for bin in range(NUM_BINS):
        if reached + bins[bin] < typical_p * total:
            reached += bins[bin]
            continue
        found = np.flatnonzero(masses > 0.0)
        found = found[(distances[found] * per_unit).astype(np.int64) == bin]
        found = found[np.argsort(distances[found])]
        for i in found:
            reached += masses[i]
            if reached >= typical_p * total:
                return _bounds(logits, start, masses, distances, distances[i])
    return least, MOST


@njit(**_FAST)
def _bounds(logits, start, masses, distances, furthest):  # type: ignore[no-untyped-def]
    """The smallest and the largest logit of the tokens that have a mass and are no further than `furthest`."""
    least, most = MOST, LEAST
    for i in range(len(distances)):
        if masses[i] > 0.0 and distances[i] <= furthest:
            least, most = min(least, logits[start + i]), max(most, logits[start + i])
    return least, most


@njit(**_FAST)
def _draw(logits, start, size, best, scale, least, most, number):  # type: ignore[no-untyped-def]
    """The first token at which the cumulated mass exceeds `number` of the whole; and the whole."""
    num_chunks = (size + CHUNK - 1) // CHUNK
    masses = np.empty(num_chunks, np.float64)
    total = np.float64(0.0)
    for chunk in range(num_chunks):
        first = chunk * CHUNK
        masses[chunk] = _mass(logits, start + first, min(CHUNK, size - first), best, scale, least, most)
        total += masses[chunk]
    target = number * total
    passed = np.float64(0.0)
    chosen = -1
    for chunk in range(num_chunks):
        if passed + masses[chunk] <= target and chunk < num_chunks - 1:
            passed += masses[chunk]
            continue
        for i in range(chunk * CHUNK, min(size, chunk * CHUNK + CHUNK)):
            if least <= logits[start + i] <= most:
                mass = np.float64(_exp((logits[start + i] - best) * scale))
                if mass > 0.0:
                    chosen = i  # rounding may leave the target a hair above the chunk's end: then its last token
                passed += mass
                if passed > target:
                    break
        if chosen >= 0:
            break
    return chosen, total


@njit(**_FAST)
def _nth_best(logits, start, size, count, least, most):  # type: ignore[no-untyped-def]
    """The smallest logit among the `count` best of those that are allowed; never -inf."""
    if most < MOST:
        allowed = logits[start : start + size].copy()
        allowed[allowed > most] = LEAST
        logits, start = allowed, 0
    return max(_keep_best(logits, start, size, count)[count - 1], least, LEAST_FINITE)


@njit(**_FAST)
def _sample_row(logits, raw, start, size, wanted, result):  # type: ignore[no-untyped-def]
    best = _largest(logits, start, size)
    result.is_finite = np.isfinite(best)
    scale, least, most, total = np.float32(1.0), LEAST, MOST, np.float64(-1.0)
    if wanted.temperature == GREEDY:
        token = 0
        while logits[start + token] != best and token < size - 1:
            token += 1
    else:
        scale = np.float32(1.0) / wanted.temperature
        least = _threshold(logits, start, size, best, scale, wanted.top_k, wanted.top_p)
        if wanted.log_min_p > LEAST:
            least = max(least, best + wanted.log_min_p / scale)
        if wanted.typical_p < 1.0:
            least, most = _typical_bounds(logits, start, size, best, scale, least, wanted.typical_p)
        chosen, total = _draw(logits, start, size, best, scale, least, most, wanted.number)
        token = max(chosen, 0)
        if not np.isfinite(total):
            result.is_finite = 0
        if wanted.is_filtered == 0 and (scale != np.float32(1.0) or least > LEAST or most < MOST):
            scale, least, most, total = np.float32(1.0), LEAST, MOST, np.float64(-1.0)
    if wanted.raw_row >= 0:
        logits, start, total = raw, wanted.raw_row * size, np.float64(-1.0)
        best = _largest(logits, start, size)
    if total == -1.0:
        total = _total(logits, start, size, best, scale, least, most)
    result.token = token
    result.log_total = np.log(total)
    result.logprob = np.float64((logits[start + token] - best) * scale) - result.log_total
    if not np.isfinite(result.logprob):
        result.is_finite = 0
    result.num_listed = 0
    if wanted.num_top > 0:
        result.best, result.scale, result.most = best, scale, most
        result.least = _nth_best(logits, start, size, min(wanted.num_top, size), least, most)
        for i in range(start, start + size):
            result.num_listed += result.least <= logits[i] <= most


@njit(parallel=True, **_FAST)
def _sample_rows(logits, raw, size, wanted, results):  # type: ignore[no-untyped-def]
    for row in prange(len(wanted)):
        _sample_row(logits, raw, row * size, size, wanted[row], results[row])


@njit(parallel=True, **_FAST)
def _list_rows(logits, raw, size, wanted, results, ends, token_ids, logprobs):  # type: ignore[no-untyped-def]
    """Write the top tokens of each row to the places before its end, the best first."""
    for row in prange(len(wanted)):
        result = results[row]
        source, start = logits, row * size
        if wanted[row].raw_row >= 0:
            source, start = raw, wanted[row].raw_row * size
        first = place = ends[row] - result.num_listed
        listed = np.empty(result.num_listed, np.int64)
        if result.num_listed:
            for i in range(size):
                if result.least <= source[start + i] <= result.most:
                    listed[place - first] = i
                    place += 1
        order = np.argsort(-source[start + listed], kind="mergesort")
        for place in range(len(listed)):
            token = listed[order[place]]
            token_ids[first + place] = token
            scaled = (source[start + token] - result.best) * result.scale
            logprobs[first + place] = np.float64(scaled) - result.log_total


def sample(
    logits: torch.Tensor, params: SequenceOf[SamplingParams], positions: SequenceOf[int], raw: RawRows | None = None
) -> SampledBatch:
    """As `engine.sampling.sampler.Sample` says; logits [rows, vocab] float32 on the CPU."""
    num_rows, size = logits.shape
    raw_rows = [-1] * num_rows
    for index, row in enumerate(raw.rows if raw else ()):
        raw_rows[row] = index
    numbers = uniform([p.seed or 0 for p in params], positions).tolist()
    settings = [
        (
            GREEDY if p.seed is None else max(p.temperature, MIN_TEMPERATURE),
            *(p.top_k, p.top_p, log_min_p(p), p.typical_p, number, p.num_top_tokens, p.is_logprob_filtered, raw_row),
        )
        for p, number, raw_row in zip(params, numbers, raw_rows, strict=True)
    ]
    wanted, results = np.array(settings, WANTED), np.empty(num_rows, RESULT)
    own, copies = flat_view(logits), flat_view(raw.logits if raw else logits)
    _sample_rows(own, copies, size, wanted, results)
    batch = SampledBatch(
        results["token"].tolist(), results["logprob"].tolist(), results["is_finite"].astype(bool).tolist()
    )
    ends = results["num_listed"].cumsum()
    if num_rows and ends[-1]:
        token_ids, logprobs = np.empty(ends[-1], np.int64), np.empty(ends[-1], np.float64)
        _list_rows(own, copies, size, wanted, results, ends, token_ids, logprobs)
        batch.top_token_ids.extend(part.tolist() for part in np.split(token_ids, ends[:-1]))
        batch.top_logprobs.extend(part.tolist() for part in np.split(logprobs, ends[:-1]))
    return batch
