"""Matrix kernels, one per running layout and device, compiled on the machine that runs them."""

from __future__ import annotations

import importlib

from quant.base import PackedWeight, RunningWeight

KERNELS: dict[tuple[str, str], str] = {
    ("dense", "cpu"): "quant.kernels.dense_cpu:DenseCpu",
    ("bytes", "cpu"): "quant.kernels.packed_cpu:PackedCpu",
    ("nibbles", "cpu"): "quant.kernels.packed_cpu:PackedCpu",
}
"""(layout, device type) -> lazy "module:Class"; what is not here runs on the layout's plain torch twin."""

TWINS: dict[str, str] = {
    "dense": "quant.kernels.dense_torch:DenseTorch",
    "bytes": "quant.kernels.packed_torch:PackedTorch",
    "nibbles": "quant.kernels.packed_torch:PackedTorch",
}


def running_weight(packed: PackedWeight) -> RunningWeight:
    """The kernel for a packed weight on the device where it is."""
    module, name = KERNELS.get((packed.layout, packed.weight.device.type), TWINS[packed.layout]).split(":")
    made: RunningWeight = getattr(importlib.import_module(module), name)(packed)
    return made


class KernelChoice:
    """The part of `quant.base.LinearMethod` that all methods share."""

    def run(self, packed: PackedWeight) -> RunningWeight:
        return running_weight(packed)
