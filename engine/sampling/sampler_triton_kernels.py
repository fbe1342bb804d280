"""The Triton kernels of `engine.sampling.sampler_triton`, and what of a row goes to them and comes back."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

SPEC = np.dtype(
    [
        ("temperature", np.float32),  # 0: the row is greedy
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("log_min_p", np.float32),
        ("typical_p", np.float32),
        ("num_top", np.int32),
        ("is_filtered", np.int32),
        ("raw_row", np.int32),  # the row's place among the copies, -1: it is not there
        ("number", np.float64),  # in [0, 1): what is drawn
    ]
)
"""What the kernels know of a row beside its logits, in words of 32 bits."""
RESULT = np.dtype(
    [
        ("token", np.int32),
        ("logprob", np.float32),
        ("is_finite", np.int32),
        # The reported distribution, for the top tokens: a token's score is (logit - origin) * scale, its logprob
        # (logit - best) * scale - log_total, and it is there if its score's key reaches `min_key` and its nearness to
        # `centre` reaches `min_near`.
        ("origin", np.float32),
        ("best", np.float32),
        ("scale", np.float32),
        ("log_total", np.float32),
        ("min_key", np.int32),
        ("centre", np.float32),
        ("min_near", np.int32),
        ("num_listed", np.int32),
    ]
)
"""What the kernels say of a row. Ids, keys and logprobs of its top tokens follow, `capacity` of each."""


def _word(record: np.dtype[np.void], name: str) -> tl.constexpr:
    """Where a field begins, as the kernels can take it."""
    return tl.constexpr(record.fields[name][1] // 4)  # type: ignore[index]


SPEC_WORDS = tl.constexpr(SPEC.itemsize // 4)
RESULT_WORDS = tl.constexpr(RESULT.itemsize // 4)
TEMPERATURE = _word(SPEC, "temperature")
TOP_K = _word(SPEC, "top_k")
TOP_P = _word(SPEC, "top_p")
LOG_MIN_P = _word(SPEC, "log_min_p")
TYPICAL_P = _word(SPEC, "typical_p")
NUM_TOP = _word(SPEC, "num_top")
IS_FILTERED = _word(SPEC, "is_filtered")
RAW_ROW = _word(SPEC, "raw_row")
NUMBER = _word(SPEC, "number")
TOKEN = _word(RESULT, "token")
LOGPROB = _word(RESULT, "logprob")
IS_FINITE = _word(RESULT, "is_finite")
ORIGIN = _word(RESULT, "origin")
BEST = _word(RESULT, "best")
SCALE = _word(RESULT, "scale")
LOG_TOTAL = _word(RESULT, "log_total")
MIN_KEY = _word(RESULT, "min_key")
CENTRE = _word(RESULT, "centre")
MIN_NEAR = _word(RESULT, "min_near")
NUM_LISTED = _word(RESULT, "num_listed")

LOWEST = tl.constexpr(-2139095041)
"""The key of -inf."""
BY_COUNT, BY_MASS, BY_NEARNESS, LISTED = (tl.constexpr(kind) for kind in range(4))
"""How a bound is looked for: by the tokens that reach it; by their mass; by the mass of those that come as near to the
centre; by those of the tokens that reach it that also come near enough."""


@triton.jit
def _key(value):  # type: ignore[no-untyped-def]
    """An int32 that is ordered as the float32 is, 0.0 and -0.0 being the same."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _load_score(row_ptr, first, origin, scale, SIZE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scores of a tile, -inf beyond the end of the row."""
    columns = first + tl.arange(0, TILE)
    logit = tl.load(row_ptr + columns, mask=columns < SIZE, other=float("-inf"))
    return tl.where(columns < SIZE, (logit - origin) * scale, float("-inf"))


@triton.jit
def _is_allowed(score, min_key, centre, min_near):  # type: ignore[no-untyped-def]
    return (_key(score) >= min_key) & (_key(-tl.abs(score - centre)) >= min_near)


@triton.jit
def _mass_of_tile(  # type: ignore[no-untyped-def]
    row_ptr, first, best, scale, min_key, centre, min_near, SIZE: tl.constexpr, TILE: tl.constexpr
):
    score = _load_score(row_ptr, first, best, scale, SIZE, TILE)
    return tl.sum(tl.where(_is_allowed(score, min_key, centre, min_near), tl.exp(score), 0.0), 0).to(tl.float64)


@triton.jit
def _find_bound(  # type: ignore[no-untyped-def]
    row_ptr,
    origin,
    scale,
    min_key,
    centre,
    min_near,
    low,
    high,
    target,  # int32 where tokens are counted, else float32
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest key that enough tokens reach; `low` if there is none. It is at most `high`, the best token's.

    Both ends move to keys that are there, so that the search ends once it is between two neighbours.
    """
    while low < high:
        middle = ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
        if (KIND == BY_COUNT) | (KIND == LISTED):
            reached = tl.zeros((TILE,), tl.int32)
        else:
            reached = tl.zeros((TILE,), tl.float32)
        above = tl.full((TILE,), 2147483647, tl.int32)
        below = tl.full((TILE,), -2147483648, tl.int32)
        for first in range(0, SIZE, TILE):
            score = _load_score(row_ptr, first, origin, scale, SIZE, TILE)
            key = _key(score)
            is_candidate = key >= min_key
            if KIND == BY_NEARNESS:
                key = _key(-tl.abs(score - centre))
            if KIND == LISTED:
                is_candidate &= _key(-tl.abs(score - centre)) >= min_near
            is_reaching = is_candidate & (key >= middle)
            if (KIND == BY_COUNT) | (KIND == LISTED):
                reached += is_reaching.to(tl.int32)
            else:
                reached += tl.where(is_reaching, tl.exp(score), 0.0)
            above = tl.minimum(above, tl.where(is_reaching, key, 2147483647))
            below = tl.maximum(below, tl.where(is_candidate & (key < middle), key, -2147483648))
        is_enough = tl.sum(reached, 0) >= target
        next_high = tl.maximum(tl.max(below, 0), low)
        low = tl.where(is_enough, tl.maximum(tl.min(above, 0), middle), low)
        high = tl.where(is_enough, high, next_high)
    return low


@triton.jit
def _add_up(row_ptr, best, scale, min_key, SIZE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mass of the tokens that reach `min_key`, and their mean score.

    A token's surprise is as far from the entropy as its score is from the mean.
    """
    masses = tl.zeros((TILE,), tl.float32)
    weighted = tl.zeros((TILE,), tl.float32)
    for first in range(0, SIZE, TILE):
        score = _load_score(row_ptr, first, best, scale, SIZE, TILE)
        mass = tl.where(_key(score) >= min_key, tl.exp(score), 0.0)
        masses += mass
        weighted += tl.where(mass > 0.0, mass * score, 0.0)
    total = tl.sum(masses, 0)
    return total, tl.sum(weighted, 0) / total


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    row_ptr, best, scale, min_key, centre, min_near, number, token, SIZE: tl.constexpr, TILE: tl.constexpr
):
    """The first token at which the cumulated mass exceeds `number` of the whole, and the whole; else `token`."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, SIZE, TILE):
        total += _mass_of_tile(row_ptr, start, best, scale, min_key, centre, min_near, SIZE, TILE)
    target = number * total
    first = 0
    mass = _mass_of_tile(row_ptr, first, best, scale, min_key, centre, min_near, SIZE, TILE)
    while (mass <= target) & (first + TILE < SIZE):
        target -= mass
        first += TILE
        mass = _mass_of_tile(row_ptr, first, best, scale, min_key, centre, min_near, SIZE, TILE)
    score = _load_score(row_ptr, first, best, scale, SIZE, TILE)
    masses = tl.where(_is_allowed(score, min_key, centre, min_near), tl.exp(score), 0.0)
    columns = first + tl.arange(0, TILE)
    is_past = tl.cumsum(masses, 0) > target.to(tl.float32)
    chosen = tl.min(tl.where(is_past & (masses > 0.0), columns, SIZE), 0)
    # Rounding may leave the target a hair above the end of the tile: then it is its last token.
    last = tl.max(tl.where(masses > 0.0, columns, -1), 0)
    chosen = tl.where(chosen < SIZE, chosen, last)
    return tl.where(chosen >= 0, chosen, token), total.to(tl.float32)


@triton.jit
def part_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [rows, SIZE] float32
    bests_ptr,  # [rows, NUM_PARTS] float32
    masses_ptr,  # [rows, NUM_PARTS] float32, relative to the best of the part
    tokens_ptr,  # [rows, NUM_PARTS] int32: the first of the best
    SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = part * PART + tl.arange(0, PART)
    logits = tl.load(logits_ptr + row * SIZE + columns, mask=columns < SIZE, other=float("-inf"))
    # A NaN is never the best, but it spoils the mass, which tells it.
    numbers = tl.where(logits == logits, logits, float("-inf"))
    best = tl.max(numbers, 0)
    offset = tl.where(best == float("-inf"), 0.0, best)
    place = row * NUM_PARTS + part
    tl.store(bests_ptr + place, best)
    tl.store(masses_ptr + place, tl.sum(tl.exp(logits - offset), 0))
    tl.store(tokens_ptr + place, tl.min(tl.where(numbers == best, columns, SIZE), 0))


@triton.jit
def _join_parts(  # type: ignore[no-untyped-def]
    bests_ptr, masses_ptr, tokens_ptr, row, NUM_PARTS: tl.constexpr, MAX_PARTS: tl.constexpr
):
    """A row's best logit, the first token that has it, and the row's mass relative to it."""
    parts = tl.arange(0, MAX_PARTS)
    is_part = parts < NUM_PARTS
    bests = tl.load(bests_ptr + row * NUM_PARTS + parts, mask=is_part, other=float("-inf"))
    masses = tl.load(masses_ptr + row * NUM_PARTS + parts, mask=is_part, other=0.0)
    tokens = tl.load(tokens_ptr + row * NUM_PARTS + parts, mask=is_part, other=2147483647)
    best = tl.max(bests, 0)
    token = tl.min(tl.where(bests == best, tokens, 2147483647), 0)
    return best, token, tl.sum(masses * tl.exp(bests - best), 0)


@triton.jit
def _load_float(pointer):  # type: ignore[no-untyped-def]
    return tl.load(pointer).to(tl.float32, bitcast=True)


@triton.jit
def _store_float(pointer, value):  # type: ignore[no-untyped-def]
    tl.store(pointer, value.to(tl.float32).to(tl.int32, bitcast=True))


@triton.jit
def _load_double(pointer):  # type: ignore[no-untyped-def]
    low = tl.load(pointer).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(pointer + 1).to(tl.int64)
    return ((high << 32) | low).to(tl.float64, bitcast=True)


@triton.jit
def _is_finite(value):  # type: ignore[no-untyped-def]
    return tl.abs(value) < float("inf")


@triton.jit(do_not_specialize=["width"])
def choose_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [rows, SIZE] float32
    bests_ptr,  # [rows, NUM_PARTS] float32, and so on: what `part_kernel` wrote of the rows
    masses_ptr,
    tokens_ptr,
    raw_ptr,  # [copies, SIZE] float32
    raw_bests_ptr,  # [copies, NUM_PARTS] float32, and so on: what it wrote of the copies
    raw_masses_ptr,
    raw_tokens_ptr,
    specs_ptr,  # [rows, SPEC_WORDS] int32
    results_ptr,  # [rows, width] int32
    width,
    SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    spec = specs_ptr + row * SPEC_WORDS
    result = results_ptr + row * width
    row_ptr = logits_ptr + row * SIZE
    temperature = _load_float(spec + TEMPERATURE)
    raw_row = tl.load(spec + RAW_ROW)
    best, token, mass = _join_parts(bests_ptr, masses_ptr, tokens_ptr, row, NUM_PARTS, MAX_PARTS)
    is_finite = _is_finite(best) & _is_finite(mass)
    # What is reported is the model's own distribution, unless something else comes.
    origin = best * 0.0
    scale = tl.full((), 1.0, tl.float32)
    log_total = tl.log(mass)
    min_key = tl.full((), LOWEST, tl.int32)
    centre = tl.full((), 0.0, tl.float32)
    min_near = tl.full((), LOWEST, tl.int32)
    if (temperature > 0.0) & is_finite:
        drawn_scale = 1.0 / temperature
        top_k = tl.load(spec + TOP_K)
        top_p = _load_float(spec + TOP_P)
        typical_p = _load_float(spec + TYPICAL_P)
        low = tl.full((), LOWEST, tl.int32)
        near = tl.full((), LOWEST, tl.int32)
        middle = tl.full((), 0.0, tl.float32)
        zero = tl.full((), 0, tl.int32)  # the key of the best token's score
        if (top_k > 0) & (top_k < SIZE):
            low = _find_bound(row_ptr, best, drawn_scale, low, middle, near, low, zero, top_k, BY_COUNT, SIZE, TILE)
        if top_p < 1.0:
            mass, _ = _add_up(row_ptr, best, drawn_scale, low, SIZE, TILE)
            target = top_p * mass
            low = _find_bound(row_ptr, best, drawn_scale, low, middle, near, low, zero, target, BY_MASS, SIZE, TILE)
        low = tl.maximum(low, _key(_load_float(spec + LOG_MIN_P)))
        if typical_p < 1.0:
            mass, middle = _add_up(row_ptr, best, drawn_scale, low, SIZE, TILE)
            target = typical_p * mass
            near = _find_bound(
                row_ptr, best, drawn_scale, low, middle, near, near, zero, target, BY_NEARNESS, SIZE, TILE
            )
        number = _load_double(spec + NUMBER)
        token, total = _draw(row_ptr, best, drawn_scale, low, middle, near, number, token, SIZE, TILE)
        is_finite = is_finite & _is_finite(total)
        if tl.load(spec + IS_FILTERED) != 0:
            origin = best
            scale = drawn_scale
            log_total = tl.log(total)
            min_key = low
            centre = middle
            min_near = near
    reported = row_ptr
    if raw_row >= 0:
        raw = raw_row.to(tl.int64)
        reported = raw_ptr + raw * SIZE
        best, _, mass = _join_parts(raw_bests_ptr, raw_masses_ptr, raw_tokens_ptr, raw, NUM_PARTS, MAX_PARTS)
        log_total = tl.log(mass)
    logprob = (tl.load(reported + token) - best) * scale - log_total
    is_finite = is_finite & _is_finite(logprob)
    tl.store(result + TOKEN, token)
    _store_float(result + LOGPROB, logprob)
    tl.store(result + IS_FINITE, is_finite.to(tl.int32))
    _store_float(result + ORIGIN, origin)
    _store_float(result + BEST, best)
    _store_float(result + SCALE, scale)
    _store_float(result + LOG_TOTAL, log_total)
    tl.store(result + MIN_KEY, min_key)
    _store_float(result + CENTRE, centre)
    tl.store(result + MIN_NEAR, min_near)
    tl.store(result + NUM_LISTED, 0)


@triton.jit(do_not_specialize=["width", "capacity"])
def list_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [rows, SIZE] float32
    raw_ptr,  # [copies, SIZE] float32
    specs_ptr,  # [rows, SPEC_WORDS] int32
    results_ptr,  # [rows, width] int32: what `choose_kernel` wrote, then ids, keys and logprobs, `capacity` of each
    width,
    capacity,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    spec = specs_ptr + row * SPEC_WORDS
    result = results_ptr + row * width
    num_top = tl.load(spec + NUM_TOP)
    if (num_top == 0) | (tl.load(result + IS_FINITE) == 0):
        return
    raw_row = tl.load(spec + RAW_ROW)
    row_ptr = logits_ptr + row * SIZE
    if raw_row >= 0:
        row_ptr = raw_ptr + raw_row.to(tl.int64) * SIZE
    origin = _load_float(result + ORIGIN)
    best = _load_float(result + BEST)
    scale = _load_float(result + SCALE)
    log_total = _load_float(result + LOG_TOTAL)
    centre = _load_float(result + CENTRE)
    min_near = tl.load(result + MIN_NEAR)
    low = tl.maximum(tl.load(result + MIN_KEY), LOWEST + 1)  # what is ruled out is never listed
    high = _key((best - origin) * scale)
    count = tl.minimum(num_top, SIZE)
    bound = _find_bound(row_ptr, origin, scale, low, centre, min_near, low, high, count, LISTED, SIZE, TILE)
    num_listed = tl.full((), 0, tl.int32)
    for first in range(0, SIZE, TILE):
        score = _load_score(row_ptr, first, origin, scale, SIZE, TILE)
        is_listed = _is_allowed(score, bound, centre, min_near)
        place = num_listed + tl.cumsum(is_listed.to(tl.int32), 0) - 1
        is_stored = is_listed & (place < capacity)
        target = result + RESULT_WORDS + place
        tl.store(target, first + tl.arange(0, TILE), mask=is_stored)
        tl.store(target + capacity, _key(score), mask=is_stored)
        logprob = score + (origin - best) * scale - log_total
        tl.store(target + 2 * capacity, logprob.to(tl.int32, bitcast=True), mask=is_stored)
        num_listed += tl.sum(is_listed.to(tl.int32), 0)
    tl.store(result + NUM_LISTED, num_listed)
