"""Masks on a CPU: a Numba kernel that skips what is allowed, the fast path of `engine.sampling.grammar_torch`."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from engine.sampling.grammar import WORD_BITS, IntArray
from quant.kernels.dense_cpu import flat_view


@njit(nogil=True, boundscheck=False, error_model="numpy", cache=True)
def _apply(logits, size, rows, masks):  # type: ignore[no-untyped-def]
    for index in range(rows.shape[0]):
        start = np.int64(rows[index]) * size
        for word in range(masks.shape[1]):
            bits = masks[index, word]
            if bits == -1:
                continue
            first = word * WORD_BITS
            for bit in range(min(WORD_BITS, size - first)):
                if not (bits >> bit) & 1:
                    logits[start + first + bit] = -np.inf


def apply_masks(logits: torch.Tensor, rows: IntArray, masks: IntArray) -> None:
    """As `engine.sampling.grammar.ApplyMasks` says; logits on the CPU."""
    _apply(flat_view(logits), logits.shape[1], rows, masks)
