"""Matrix kernels, one per running layout and device, compiled on the machine that runs them."""

from __future__ import annotations

import importlib

import torch

from quant.base import RunningWeight

KERNELS: dict[tuple[str, str], str] = {
    ("dense", "cpu"): "quant.kernels.dense_cpu:DenseCpu",
}
"""(layout, device type) -> lazy "module:Class"; what is not here runs on the layout's plain torch twin."""

TWINS: dict[str, str] = {
    "dense": "quant.kernels.dense_torch:DenseTorch",
}


def running_weight(layout: str, weight: torch.Tensor, *rest: torch.Tensor | None) -> RunningWeight:
    """The kernel for tensors in `layout`, on the device where they are."""
    module, name = KERNELS.get((layout, weight.device.type), TWINS[layout]).split(":")
    made: RunningWeight = getattr(importlib.import_module(module), name)(weight, *rest)
    return made
