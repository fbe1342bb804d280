"""Matrix kernels, one per running layout and device, compiled on the machine that runs them."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from quant.base import MatrixKernel, PackedWeight

logger = logging.getLogger(__name__)

KERNELS: dict[tuple[str, str], str] = {
    ("dense", "cpu"): "quant.kernels.dense_cpu:DenseCpu",
    ("bytes", "cpu"): "quant.kernels.packed_cpu:PackedCpu",
    ("nibbles", "cpu"): "quant.kernels.packed_cpu:PackedCpu",
}
"""(layout, device type) -> lazy "module:Class"; what is not here runs on the layout's plain torch twin."""

ROUNDING_KERNELS: dict[tuple[str, str], str] = {
    ("bytes", "cpu"): "quant.kernels.integer_cpu:IntegerCpu",
    ("nibbles", "cpu"): "quant.kernels.integer_cpu:IntegerCpu",
}
"""Kernels that round activations, taken first where that is allowed and `why_not` has no objection."""

TWINS: dict[str, str] = {
    "dense": "quant.kernels.dense_torch:DenseTorch",
    "bytes": "quant.kernels.packed_torch:PackedTorch",
    "nibbles": "quant.kernels.packed_torch:PackedTorch",
}


def running_weight(packed: PackedWeight, *, is_exact: bool = True) -> MatrixKernel:
    """The kernel for a packed weight on the device where it is; `is_exact`: activations are not rounded."""
    key = packed.layout, packed.weight.device.type
    if not is_exact and key in ROUNDING_KERNELS:
        kernel = _entry(ROUNDING_KERNELS[key])
        objection = kernel.why_not(packed)
        if objection is None:
            return _made(kernel, packed)
        logger.debug("A matrix %s runs in float32: %s", list(packed.weight.shape), objection)
    return _made(_entry(KERNELS.get(key, TWINS[packed.layout])), packed)


def rounding_instructions(device_type: str) -> str | None:
    """What the kernels that round activations are made of on a device; None: it has no such kernels."""
    if not any(device == device_type for _, device in ROUNDING_KERNELS):
        return None
    from quant.kernels.integer_ops import find_instructions

    found = find_instructions()
    return None if found is None else found.feature


def _entry(lazy: str) -> Any:
    module, name = lazy.split(":")
    return getattr(importlib.import_module(module), name)


def _made(kernel: Any, packed: PackedWeight) -> MatrixKernel:
    made: MatrixKernel = kernel(packed)
    return made
