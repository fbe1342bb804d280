"""The operations of experts in plain torch: the reference implementation, which reads nothing back from a device."""

from __future__ import annotations

import torch

from engine.layers.base import Routing
from quant.base import RowGroups


class TorchExpertOps:
    """The part of `base.Ops` that only models with experts call."""

    def route(self, logits: torch.Tensor, num_experts: int, top_k: int, *, is_normalized: bool) -> Routing:
        probabilities = logits[:, :num_experts].to(torch.float32).softmax(dim=1)
        weights, chosen = probabilities.topk(top_k, dim=1)
        if is_normalized:
            weights = weights / weights.sum(dim=1, keepdim=True)
        experts, order = chosen.flatten().sort(stable=True)
        ids = torch.arange(num_experts, device=logits.device)
        counts = (experts[:, None] == ids).sum(dim=0)  # `bincount` would read the largest id on the host
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        is_active = counts > 0
        active = torch.cat([is_active.sum().view(1), is_active.logical_not().sort(stable=True).indices])
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=logits.device))
        groups = RowGroups(_as_int32(starts), _as_int32(active), _as_int32(experts), _as_int32(order // top_k))
        return Routing(groups, _as_int32(places.view_as(chosen)), weights)

    def mix(self, outputs: torch.Tensor, routing: Routing) -> torch.Tensor:
        spread = outputs[routing.places].to(torch.float32)  # [rows, chosen, size]
        return (spread * routing.weights[:, :, None]).sum(dim=1).to(outputs.dtype)

    def add_gated(self, x: torch.Tensor, y: torch.Tensor, logits: torch.Tensor, column: int) -> torch.Tensor:
        return x.add_(logits[:, column : column + 1].sigmoid() * y)


def _as_int32(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.to(torch.int32)
