"""Sampling on a CPU: one Numba kernel over all rows, the fast path of `engine.sampling.sampler_torch`.

A plain sample reads the row twice: for its best logit, and for the masses of its chunks, of which then only one is
looked at closely. Every filter leaves the tokens whose logits lie between two bounds: top-k, top-p and min-p set the
lower one, which is found among the best few, kept in a heap while the row is read; typical-p sets both. Logprobs of the
model's own distribution take another look at the row, or at its copy, where it is not the one that was drawn from.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numba import njit, prange

from engine.link.messages import SamplingParams
from engine.sampling.sampler import RawRows, bounded_temperature, log_min_p, uniform
from engine.scheduling.batch import SampledBatch
from quant.kernels.arrays import FAST, flat_view
from quant.kernels.powers import exp
from quant.kernels.simd import add, load16, max_lanes, max_of, multiply, splat16, subtract, sum_lanes, zeros16

WIDTH = 16
"""Logits of a vector."""
CHUNK = 512
FIRST_CANDIDATES = 64
"""Top-p looks among this many best tokens first, then among `MAX_HEAP`, then among all."""
MAX_HEAP = 512
"""More of a row's best are found by sorting it: a heap of thousands takes ten times as long."""
DIGIT_BITS = 11
"""Bits of a key that one pass of the sort looks at: three passes for 32."""
NUM_BINS = 4096
"""Bins of distances from the entropy, for typical-p."""
GREEDY = 0.0
"""The kernel's temperature for greedy rows."""

NO_MIN, NO_MAX = np.float32(-np.inf), np.float32(np.inf)
"""The bounds of allowed logits where nothing is filtered."""
MIN_FINITE = np.finfo(np.float32).min

PARAMETERS: dict[str, tuple[type, Callable[[SamplingParams], float]]] = {
    "temperature": (np.float32, lambda p: GREEDY if p.seed is None else bounded_temperature(p)),
    "top_k": (np.int64, lambda p: p.top_k),
    "top_p": (np.float64, lambda p: p.top_p),
    "log_min_p": (np.float32, log_min_p),
    "typical_p": (np.float64, lambda p: p.typical_p),
    "num_top": (np.int64, lambda p: p.num_top_tokens),
    "is_filtered": (np.int64, lambda p: p.is_logprob_filtered),
}
"""Field of a row's specification -> its type, and its value by the request's parameters."""
SPEC = np.dtype(
    [
        *((name, kind) for name, (kind, _) in PARAMETERS.items()),
        ("number", np.float64),  # in [0, 1): what is drawn
        ("raw_row", np.int64),  # the row's place among the copies, -1: it is not there
    ],
    align=True,
)
"""What the kernel knows of a row beside its logits."""
RESULT = np.dtype(
    [
        ("token", np.int64),
        ("logprob", np.float64),
        ("is_finite", np.int64),
        # The reported distribution, for the top tokens: exp((logit - best) * scale) / total of what is in the bounds.
        ("best", np.float32),
        ("scale", np.float32),
        ("log_total", np.float64),
        ("min_logit", np.float32),
        ("max_logit", np.float32),
        ("num_listed", np.int64),
    ],
    align=True,
)


def _packing(kind: np.dtype[np.void]) -> struct.Struct:
    """Packs numbers as C and an aligned dtype do. NumPy takes several times as long for few where caches are empty."""
    assert kind.fields is not None
    return struct.Struct("".join(field[0].char for field in kind.fields.values()) + "0q")


PACKED_SPEC, PACKED_RESULT = _packing(SPEC), _packing(RESULT)


@njit(inline="always")
def _exp(value):  # type: ignore[no-untyped-def]
    return max_lanes(exp(splat16(value)))


@njit(**FAST)
def _best(logits, start, size):  # type: ignore[no-untyped-def]
    first = second = splat16(np.float32(-np.inf))  # two, so that none waits for the one before it
    whole = size - size % (2 * WIDTH)
    for i in range(start, start + whole, 2 * WIDTH):
        first, second = max_of(load16(logits, i), first), max_of(load16(logits, i + WIDTH), second)
    max_logit = max_lanes(max_of(first, second))
    for i in range(start + whole, start + size):
        max_logit = max(max_logit, logits[i])
    return max_logit


@njit(**FAST)
def _best_and_chunk(logits, start, size):  # type: ignore[no-untyped-def]
    """The largest logit, and where the first chunk that has it begins."""
    best, place = NO_MIN, start
    for first in range(start, start + size, CHUNK):
        chunk_best = _best(logits, first, min(CHUNK, start + size - first))
        if chunk_best > best:
            best, place = chunk_best, first
    return best, place


@njit(**FAST)
def _mass(logits, start, size, best, scale, min_logit, max_logit):  # type: ignore[no-untyped-def]
    """Sum of exp((logit - best) * scale) over the logits that are not below `min_logit` and not above `max_logit`."""
    total = np.float64(0.0)
    if min_logit == NO_MIN and max_logit == NO_MAX:
        whole = size - size % WIDTH
        lanes_sum, offset, factor = zeros16(), splat16(best), splat16(scale)
        for i in range(start, start + whole, WIDTH):
            lanes_sum = add(lanes_sum, exp(multiply(subtract(load16(logits, i), offset), factor)))
        total += np.float64(sum_lanes(lanes_sum))
        start, size = start + whole, size - whole
    for i in range(start, start + size):
        if not logits[i] < min_logit and not logits[i] > max_logit:  # so that a NaN counts, and shows in the total
            total += np.float64(_exp((logits[i] - best) * scale))
    return total


@njit(**FAST)
def _total(logits, start, size, best, scale, min_logit, max_logit):  # type: ignore[no-untyped-def]
    """The mass of a whole row, chunk by chunk: a float32 sum of a whole vocabulary would be off by 1e-5."""
    total = np.float64(0.0)
    for first in range(0, size, CHUNK):
        total += _mass(logits, start + first, min(CHUNK, size - first), best, scale, min_logit, max_logit)
    return total


@njit(**FAST)
def _descending(values):  # type: ignore[no-untyped-def]
    """The values sorted, the largest first, digit by digit of their bits: time grows with their number alone."""
    num_digits = 1 << DIGIT_BITS
    keys, sorted_keys = values.view(np.uint32).copy(), np.empty(len(values), np.uint32)
    for i in range(len(keys)):  # in the order of unsigned integers the bits of a larger value come first
        keys[i] ^= np.uint32(0) if keys[i] >> np.uint32(31) else np.uint32(0x7FFFFFFF)
    for shift in range(0, 32, DIGIT_BITS):
        ends = np.zeros(num_digits + 1, np.int64)
        for key in keys:
            ends[((key >> np.uint32(shift)) & np.uint32(num_digits - 1)) + 1] += 1
        for digit in range(num_digits):
            ends[digit + 1] += ends[digit]
        for key in keys:
            digit = (key >> np.uint32(shift)) & np.uint32(num_digits - 1)
            sorted_keys[ends[digit]] = key
            ends[digit] += 1
        keys, sorted_keys = sorted_keys, keys
    for i in range(len(keys)):
        keys[i] ^= np.uint32(0) if keys[i] >> np.uint32(31) else np.uint32(0x7FFFFFFF)
    return keys.view(np.float32)


@njit(**FAST)
def _keep_best(logits, start, size, count):  # type: ignore[no-untyped-def]
    """The `count` largest logits, descending: a heap with the smallest on top, while the row is read."""
    if count > MAX_HEAP:
        return _descending(logits[start : start + size])[:count]
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


@njit(**FAST)
def _threshold(logits, start, size, best, scale, top_k, top_p):  # type: ignore[no-untyped-def]
    """The smallest logit that may be chosen; ties with it may be, too."""
    min_logit = np.float32(-np.inf)
    if 0 < top_k < size:
        min_logit = _keep_best(logits, start, size, top_k)[top_k - 1]
    if top_p >= 1.0:
        return min_logit
    mass = top_p * _total(logits, start, size, best, scale, min_logit, NO_MAX)
    count = min(FIRST_CANDIDATES, size)
    while True:
        candidates = _keep_best(logits, start, size, count)
        reached = np.float64(0.0)
        for value in candidates:
            if value < min_logit:
                return min_logit
            reached += np.float64(_exp((value - best) * scale))
            if reached >= mass:
                return value
        if count == size:
            return min_logit
        count = min(MAX_HEAP, size) if count < MAX_HEAP else size


@njit(**FAST)
def _typical_bounds(logits, start, size, best, scale, min_logit, typical_p):  # type: ignore[no-untyped-def]
    """The smallest and the largest logit of the tokens whose surprise is nearest to the entropy.

    For scaled logits z with normalizer log t, a token's surprise is log t - z and the entropy log t - E[z]: they are
    |z - E[z]| apart, so that what is allowed lies between two logits. Masses are added up in bins of that distance, and
    only the bin in which they reach `typical_p` is sorted.
    """
    masses = np.zeros(size, np.float32)
    total = weighted = np.float64(0.0)
    for i in range(size):
        if logits[start + i] >= min_logit:
            z = (logits[start + i] - best) * scale
            masses[i] = _exp(z)
            if masses[i] > 0.0:
                total += masses[i]
                weighted += np.float64(masses[i]) * z
    if not total > 0.0:  # no number can be drawn, and the draw will say so
        return min_logit, NO_MAX
    centre = np.float32(weighted / total)
    distances = np.abs((logits[start : start + size] - best) * scale - centre)
    distances[masses == 0.0] = np.float32(0.0)  # without a mass they count nowhere
    per_unit = np.float32(NUM_BINS - 1) / max(distances.max(), np.float32(1e-30))
    bins = np.zeros(NUM_BINS, np.float64)
    for i in range(size):
        bins[np.int64(distances[i] * per_unit)] += masses[i]
    reached = np.float64(0.0)
    for bin in range(NUM_BINS):
        if reached + bins[bin] < typical_p * total:
            reached += bins[bin]
            continue
        members = np.flatnonzero(masses > 0.0)
        members = members[(distances[members] * per_unit).astype(np.int64) == bin]
        members = members[np.argsort(distances[members])]
        for i in members:
            reached += masses[i]
            if reached >= typical_p * total:
                return _bounds(logits, start, masses, distances, distances[i])
    return min_logit, NO_MAX


@njit(**FAST)
def _bounds(logits, start, masses, distances, furthest):  # type: ignore[no-untyped-def]
    """The smallest and the largest logit of the tokens that have a mass and are no further than `furthest`."""
    min_logit, max_logit = NO_MAX, NO_MIN
    for i in range(len(distances)):
        if masses[i] > 0.0 and distances[i] <= furthest:
            min_logit, max_logit = min(min_logit, logits[start + i]), max(max_logit, logits[start + i])
    return min_logit, max_logit


@njit(**FAST)
def _draw(logits, start, size, best, scale, min_logit, max_logit, number):  # type: ignore[no-untyped-def]
    """The first token at which the cumulated mass exceeds `number` of the whole; and the whole."""
    num_chunks = (size + CHUNK - 1) // CHUNK
    masses = np.empty(num_chunks, np.float64)
    total = np.float64(0.0)
    for chunk in range(num_chunks):
        first = chunk * CHUNK
        masses[chunk] = _mass(logits, start + first, min(CHUNK, size - first), best, scale, min_logit, max_logit)
        total += masses[chunk]
    target = number * total
    passed = np.float64(0.0)
    chosen = -1
    for chunk in range(num_chunks):
        if passed + masses[chunk] <= target and chunk < num_chunks - 1:
            passed += masses[chunk]
            continue
        for i in range(chunk * CHUNK, min(size, chunk * CHUNK + CHUNK)):
            if min_logit <= logits[start + i] <= max_logit:
                mass = np.float64(_exp((logits[start + i] - best) * scale))
                if mass > 0.0:
                    chosen = i  # rounding may leave the target a hair above the chunk's end: then its last token
                passed += mass
                if passed > target:
                    break
        if chosen >= 0:
            break
    return chosen, total


@njit(**FAST)
def _nth_best(logits, start, size, count, min_logit, max_logit):  # type: ignore[no-untyped-def]
    """The smallest logit among the `count` best of those that are allowed; never -inf."""
    if max_logit < NO_MAX:
        allowed = logits[start : start + size].copy()
        allowed[allowed > max_logit] = NO_MIN
        logits, start = allowed, 0
    return max(_keep_best(logits, start, size, count)[count - 1], min_logit, MIN_FINITE)


@njit(**FAST)
def _sample_row(logits, raw, start, size, spec, result):  # type: ignore[no-untyped-def]
    best, place = _best_and_chunk(logits, start, size)
    result.is_finite = np.isfinite(best)
    scale, min_logit, max_logit, total = np.float32(1.0), NO_MIN, NO_MAX, np.float64(-1.0)
    if spec.temperature == GREEDY:
        token = place - start
        while logits[start + token] != best and token < size - 1:
            token += 1
    else:
        scale = np.float32(1.0) / spec.temperature
        min_logit = _threshold(logits, start, size, best, scale, spec.top_k, spec.top_p)
        if spec.log_min_p > NO_MIN:
            min_logit = max(min_logit, best + spec.log_min_p / scale)
        if spec.typical_p < 1.0:
            min_logit, max_logit = _typical_bounds(logits, start, size, best, scale, min_logit, spec.typical_p)
        chosen, total = _draw(logits, start, size, best, scale, min_logit, max_logit, spec.number)
        token = max(chosen, 0)
        if not np.isfinite(total):
            result.is_finite = 0
        if spec.is_filtered == 0 and (scale != np.float32(1.0) or min_logit > NO_MIN or max_logit < NO_MAX):
            scale, min_logit, max_logit, total = np.float32(1.0), NO_MIN, NO_MAX, np.float64(-1.0)
    if spec.raw_row >= 0:
        logits, start, total = raw, spec.raw_row * size, np.float64(-1.0)
        best = _best(logits, start, size)
    if total == -1.0:
        total = _total(logits, start, size, best, scale, min_logit, max_logit)
    result.token = token
    result.log_total = np.log(total)
    result.logprob = np.float64((logits[start + token] - best) * scale) - result.log_total
    if not np.isfinite(result.logprob):
        result.is_finite = 0
    result.num_listed = 0
    if spec.num_top > 0:
        result.best, result.scale, result.max_logit = best, scale, max_logit
        result.min_logit = _nth_best(logits, start, size, min(spec.num_top, size), min_logit, max_logit)
        for i in range(start, start + size):
            result.num_listed += result.min_logit <= logits[i] <= max_logit


@njit(parallel=True, **FAST)
def _sample_rows(logits, raw, size, specs, results):  # type: ignore[no-untyped-def]
    for row in prange(len(specs)):
        _sample_row(logits, raw, row * size, size, specs[row], results[row])


@njit(parallel=True, **FAST)
def _list_rows(logits, raw, size, specs, results, ends, token_ids, logprobs):  # type: ignore[no-untyped-def]
    """Write the top tokens of each row to the places before its end, the best first."""
    for row in prange(len(specs)):
        result = results[row]
        source, start = logits, row * size
        if specs[row].raw_row >= 0:
            source, start = raw, specs[row].raw_row * size
        first = place = ends[row] - result.num_listed
        listed = np.empty(result.num_listed, np.int64)
        if result.num_listed:
            for i in range(size):
                if result.min_logit <= source[start + i] <= result.max_logit:
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
    is_drawing = any(p.seed is not None for p in params)
    numbers = uniform([p.seed or 0 for p in params], positions).tolist() if is_drawing else [0.0] * num_rows
    specs = [
        PACKED_SPEC.pack(*[value(p) for _, value in PARAMETERS.values()], number, raw_row)
        for p, number, raw_row in zip(params, numbers, raw_rows, strict=True)
    ]
    results = bytearray(num_rows * RESULT.itemsize)
    flat, copies = flat_view(logits), flat_view(raw.logits if raw else logits)
    arrays = np.frombuffer(bytearray().join(specs), SPEC), np.frombuffer(results, RESULT)
    _sample_rows(flat, copies, size, *arrays)
    rows = [*PACKED_RESULT.iter_unpack(results)]
    batch = SampledBatch([row[0] for row in rows], [row[1] for row in rows], [bool(row[2]) for row in rows])
    if any(p.num_top_tokens for p in params):
        ends = arrays[1]["num_listed"].cumsum()
        token_ids, logprobs = np.empty(ends[-1], np.int64), np.empty(ends[-1], np.float64)
        _list_rows(flat, copies, size, *arrays, ends, token_ids, logprobs)
        batch.top_token_ids.extend(part.tolist() for part in np.split(token_ids, ends[:-1]))
        batch.top_logprobs.extend(part.tolist() for part in np.split(logprobs, ends[:-1]))
    return batch
