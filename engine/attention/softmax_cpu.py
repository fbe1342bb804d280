"""The softmax of rows of scores over the keys of one span after the other, as Numba kernels of attention inline it.

Weights are powers of 2, so scores are those of queries that were scaled by log2(e), too. A row's weights are relative
to its base: the highest score of the first span in which it sees a key, and later any that is more than
`MAX_ABOVE_BASE` above the base. Weights may be above 1; what matters is that no sum overflows,
as one of values above 1e33 might.

Arrays are float32 and flat; `head_dim` is a multiple of 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from engine.attention.attend_ops import LANES, SPAN, is_any_above, store_weights, weights_of
from quant.kernels.arrays import FAST, empty_lines
from quant.kernels.powers import exp2
from quant.kernels.simd import (
    add,
    first_lanes,
    fma,
    load16,
    max_lanes,
    max_of,
    multiply,
    splat16,
    store,
    subtract,
)

MIN_SCORE = np.float32(-3.4e38)
"""The base of no scores; finite, so that differences are numbers."""
MAX_ABOVE_BASE = np.float32(8.0)
"""How far scores may be above a row's base. Sums are float32, so weights of up to 2^8 make them no less exact, and few
spans after the first one give a row another base, for which all that it summed is scaled."""


class Softmax(NamedTuple):
    """The softmax of some rows over the keys so far, before it is divided by its totals."""

    bases: Any
    """[rows]: weights are 2^(score - base)."""
    totals: Any
    """Weights, flat [rows, 16 lanes]; added up when they are merged or divided by."""
    sums: Any
    """Weighted values, flat [rows, head_dim]."""


@njit(**FAST)
def new_softmax(num_rows, head_dim):  # type: ignore[no-untyped-def]
    """The memory of a `Softmax` of so many rows, uninitialised."""
    return Softmax(
        np.empty(num_rows, np.float32),
        np.empty(num_rows * LANES, np.float32),
        empty_lines(num_rows * head_dim * 4).view(np.float32),
    )


@njit(inline="always")
def begin_softmax(softmax, num_rows, head_dim):  # type: ignore[no-untyped-def]
    """The state of so many rows that have seen no key."""
    nothing = splat16(np.float32(0.0))
    for row in range(num_rows):
        softmax.bases[row] = MIN_SCORE
        store(softmax.totals, row * LANES, nothing)
    for d in range(0, num_rows * head_dim, LANES):
        store(softmax.sums, d, nothing)


@njit(inline="always")
def update_softmax_row(keys, scores, row, num_visible, softmax, head_dim):  # type: ignore[no-untyped-def]
    """Turn a row's scores of a span, in `scores` [rows, SPAN], into weights.

    Its base rises first if a score is far above it. The row sees the first `num_visible` keys of the span. The type of
    `keys` says how weights are stored; its numbers are not read.
    """
    bases, totals, sums = softmax
    place, lanes = row * SPAN, row * LANES
    s0, s1 = load16(scores, place), load16(scores, place + LANES)
    s2, s3 = load16(scores, place + 2 * LANES), load16(scores, place + 3 * LANES)
    if num_visible < SPAN:
        masked = np.float32(-np.inf)
        s0, s1 = first_lanes(num_visible, s0, masked), first_lanes(num_visible - LANES, s1, masked)
        s2 = first_lanes(num_visible - 2 * LANES, s2, masked)
        s3 = first_lanes(num_visible - 3 * LANES, s3, masked)
    # A NaN may hide others, and the base may stay too low: the row's result is NaN in any case.
    highest = max_of(max_of(s0, s1), max_of(s2, s3))
    if is_any_above(highest, bases[row] + MAX_ABOVE_BASE):
        top = max_lanes(highest)
        rescale = exp2(splat16(bases[row] - top))
        bases[row] = top
        store(totals, lanes, multiply(load16(totals, lanes), rescale))
        for d in range(row * head_dim, (row + 1) * head_dim, LANES):
            store(sums, d, multiply(load16(sums, d), rescale))
    base = splat16(bases[row])
    w0, w1 = weights_of(keys, subtract(s0, base)), weights_of(keys, subtract(s1, base))
    w2, w3 = weights_of(keys, subtract(s2, base)), weights_of(keys, subtract(s3, base))
    store(totals, lanes, add(load16(totals, lanes), add(add(w0, w1), add(w2, w3))))
    store_weights(keys, scores, row, 0, w0, w1)
    store_weights(keys, scores, row, 2 * LANES, w2, w3)


@njit(inline="always")
def merge_row(bases, totals, sums, row, base, total, part_sums, place, head_dim):  # type: ignore[no-untyped-def]
    """Merge a part of a row's softmax into those before it. What saw no key changes nothing, on either side.

    The part has a base, a total and sums [head_dim] from `place` on; totals are [rows] here, each of all lanes.
    """
    joint = max(bases[row], base)
    before, after = exp2(splat16(bases[row] - joint)), exp2(splat16(base - joint))
    bases[row] = joint
    totals[row] = totals[row] * max_lanes(before) + total * max_lanes(after)
    target = row * head_dim
    for d in range(0, head_dim, LANES):
        store(sums, target + d, fma(load16(part_sums, place + d), after, multiply(load16(sums, target + d), before)))


@njit(inline="always")
def finish_row(sums, row, total, head_dim, out, target):  # type: ignore[no-untyped-def]
    """Write a row's sums over the total of its weights to the output, from `target` on."""
    inverse, nothing = splat16(np.float32(1.0) / total), splat16(np.float32(0.0))
    for d in range(0, head_dim, LANES):
        # Added to 0, as a sum of negative zeros would be one, or not, depending on whether it was merged into others.
        store(out, target + d, fma(load16(sums, row * head_dim + d), inverse, nothing))
