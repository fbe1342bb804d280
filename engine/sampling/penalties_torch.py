"""Penalties, biases and green lists in plain torch: the reference implementation, on any device."""

from __future__ import annotations

import torch

from engine.sampling.penalties import Adjustments


def adjust_logits(logits: torch.Tensor, adjustments: Adjustments) -> None:
    """As `engine.sampling.penalties.AdjustLogits` says."""
    for green in adjustments.green_lists:
        logits[green.row, torch.from_numpy(green.token_ids)] += adjustments.green_gain
    places = adjustments.places
    if places is None:
        return
    device = logits.device
    where = torch.from_numpy(places.rows).to(device), torch.from_numpy(places.token_ids).to(device)
    values = logits[where]
    if places.penalties is not None and places.subtracted is not None:
        penalties = torch.from_numpy(places.penalties).to(device)
        values = torch.where(values < 0, values * penalties, values / penalties)
        values -= torch.from_numpy(places.subtracted).to(device)
    if places.biases is not None:
        values += torch.from_numpy(places.biases).to(device)
    logits[where] = values
