"""Masks in plain torch: the reference implementation, on any device."""

from __future__ import annotations

import numpy as np
import torch

from engine.sampling.grammar import IntArray


@torch.inference_mode()
def apply_masks(logits: torch.Tensor, rows: IntArray, masks: IntArray) -> None:
    """As `engine.sampling.grammar.ApplyMasks` says."""
    refused = np.unpackbits(~masks.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    where = torch.from_numpy(refused).to(logits.device).bool()
    index = torch.from_numpy(rows).to(logits.device)
    logits[index] = logits[index].masked_fill_(where, -torch.inf)
