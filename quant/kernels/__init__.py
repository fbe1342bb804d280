"""Matrix kernels: one table, from a backend's name and a packed layout to the kernels that can run it.

The device names its backend (`engine.device.DEVICES`). Where a weight's memory lies decides nothing: kernels of another
kind may run on CPU tensors, and a CPU kernel never gets a tensor of a GPU because somebody forgot to move it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from quant.base import AdapterRows, LowRankKernel, LowRankShape, MatrixKernel, PackedWeight
from quant.registry import load_entry

logger = logging.getLogger(__name__)

MATRICES: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "dense": [
            "quant.kernels.bfloat16_amx_cpu:Bfloat16Amx",
            "quant.kernels.bfloat16_cpu:Bfloat16Cpu",
            "quant.kernels.dense_cpu:DenseCpu",
        ],
        "int8": ["quant.kernels.integer_cpu:IntegerCpu", "quant.kernels.packed_cpu:PackedCpu"],
        "int4": ["quant.kernels.integer_cpu:IntegerCpu", "quant.kernels.packed_cpu:PackedCpu"],
        "fp8": ["quant.kernels.packed_cpu:PackedCpu"],
    },
    "torch": {
        "dense": ["quant.kernels.dense_torch:DenseTorch"],
        "int8": ["quant.kernels.packed_torch:PackedTorch"],
        "int4": ["quant.kernels.packed_torch:PackedTorch"],
        "fp8": ["quant.kernels.packed_torch:PackedTorch"],
    },
    "triton": {
        "dense": ["quant.kernels.matrix_triton:MatrixTriton"],
        "int8": ["quant.kernels.matrix_triton:MatrixTriton", "quant.kernels.packed_torch:PackedTorch"],
        "int4": ["quant.kernels.matrix_triton:MatrixTriton", "quant.kernels.packed_torch:PackedTorch"],
    },
}
"""Backend -> layout of `quant.base.PackedWeight` -> lazy "module:Class" of `MatrixKernel`s, the preferred one first.

"torch" is the reference implementation, on which a layout runs that another backend does not list.
"""

LOW_RANK: dict[str, list[str]] = {
    "cpu": ["quant.kernels.low_rank_cpu:LowRankCpu", "quant.kernels.low_rank_torch:LowRankTorch"],
    "triton": ["quant.kernels.low_rank_triton:LowRankTriton"],
}
"""Backend -> lazy "module:Class" of `LowRankKernel`s for adapters, the preferred one first; others have torch's."""


def make_low_rank_kernel(backend: str, shape: LowRankShape, step: AdapterRows) -> LowRankKernel:
    """The first kernel of the backend that takes matrices of this shape; the reference implementation takes any."""
    entries = LOW_RANK.get(backend, ["quant.kernels.low_rank_torch:LowRankTorch"])
    kernel: type[LowRankKernel] = next(kernel for kernel in map(load_entry, entries) if not kernel.why_not(shape))
    return kernel(shape, step)


def choose_kernel(backend: str, packed: PackedWeight, *, is_exact: bool = True) -> MatrixKernel:
    """Make the first kernel that takes the weight; `is_exact`: none that rounds activations.

    Raises ValueError with the reasons if no kernel takes it.
    """
    refusals: list[str] = []
    for kernel in _kernels(backend, packed.layout):
        if is_exact and kernel.rounding is not None:
            continue
        reasons = kernel.why_not(packed)
        if not reasons:
            return kernel(packed)
        refusals += reasons
        if kernel.rounding is not None:
            logger.debug(
                "A matrix %s runs without %s: %s", list(packed.weight.shape), kernel.rounding, "; ".join(reasons)
            )
    raise ValueError("; ".join(refusals))


def rounding_instructions(backend: str, layout: str) -> str | None:
    """The instructions with which the backend's kernels for a layout round activations; None: none of them does."""
    return next((kernel.rounding for kernel in _kernels(backend, layout) if kernel.rounding is not None), None)


def compiled_row_counts(backend: str) -> list[int]:
    """Numbers of rows that between them need every program of the backend's kernels: a warm-up has steps of these.

    Programs are compiled when they are first needed, which would be while requests wait. Empty: rows decide nothing.
    """
    kernels = (kernel for layout in MATRICES[backend] for kernel in _kernels(backend, layout))
    return sorted({count for kernel in kernels for count in kernel.row_counts})


def _kernels(backend: str, layout: str) -> Iterator[type[MatrixKernel]]:
    """The kernels for a layout, each imported when its turn comes."""
    entries = MATRICES[backend].get(layout) or MATRICES["torch"][layout]
    return map(load_entry, entries)
