"""Products with many matrices of one shape, of which each row has one: what a layer of experts needs.

The device's backend has grouped kernels for some layouts. Everything else is computed matrix by matrix, by the kernels
that single matrices have: the reference implementation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from quant.base import GroupedKernel, MatrixKernel, PackedWeight, RowGroups
from quant.registry import load_entry


class GroupedKernelClass(Protocol):
    """A kernel of the table `GROUPED`."""

    rounding: str | None
    """The instructions with which it rounds activations to 8 bits; None: it takes them as they are."""

    @staticmethod
    def why_not(matrices: Sequence[PackedWeight]) -> list[str]:
        """Reasons why the kernel can't run these matrices, which `are_alike`; empty if it can."""

    def __call__(self, matrices: Sequence[PackedWeight]) -> GroupedKernel: ...


GROUPED: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "dense": ["quant.kernels.grouped_cpu:GroupedDenseCpu"],
        "int8": ["quant.kernels.grouped_cpu:GroupedIntegerCpu", "quant.kernels.grouped_cpu:GroupedPackedCpu"],
        "int4": ["quant.kernels.grouped_cpu:GroupedIntegerCpu", "quant.kernels.grouped_cpu:GroupedPackedCpu"],
        "fp8": ["quant.kernels.grouped_cpu:GroupedPackedCpu"],
    },
    "triton": {
        "dense": ["quant.kernels.grouped_triton:GroupedTriton"],
        "int8": ["quant.kernels.grouped_triton:GroupedTriton"],
        "int4": ["quant.kernels.grouped_triton:GroupedTriton"],
        "fp8": ["quant.kernels.grouped_triton:GroupedTriton"],
    },
}
"""Backend -> layout of `quant.base.PackedWeight` -> lazy "module:Class" of grouped kernels, the preferred one first."""


class MatrixByMatrix:
    """The reference implementation. The numbers of rows are read by the host."""

    is_host_driven = True

    def __init__(self, kernels: Sequence[MatrixKernel]) -> None:
        self._kernels = kernels

    def __call__(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        spans = enumerate(itertools.pairwise(groups.starts.tolist()))
        products = [self._kernels[index](x[start:end]) for index, (start, end) in spans if end > start]
        return torch.cat(products) if products else self._kernels[0](x)


def choose_grouped(
    backend: str,
    matrices: Sequence[PackedWeight],
    kernel_for: Callable[[PackedWeight], MatrixKernel],
    *,
    is_exact: bool,
) -> GroupedKernel:
    """Make the first grouped kernel that takes the matrices, or use those of single ones; as `kernels.choose_kernel`.

    Raises ValueError with the reasons if no kernel takes them.
    """
    entries = GROUPED.get(backend, {}).get(matrices[0].layout, []) if are_alike(matrices) else []
    for entry in entries:
        kernel: GroupedKernelClass = load_entry(entry)
        if not (is_exact and kernel.rounding) and not kernel.why_not(matrices):
            return kernel(matrices)
    return MatrixByMatrix([kernel_for(packed) for packed in matrices])


def are_alike(matrices: Sequence[PackedWeight]) -> bool:
    """Whether the matrices can lie one after the other in one memory, and all or none read their inputs in order."""

    def form(packed: PackedWeight) -> tuple[object, ...]:
        tensors = packed.weight, packed.scales, packed.zero_points, packed.bias
        forms = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
        return packed.layout, packed.input_order is None, *forms

    first = form(matrices[0])
    return all(form(packed) == first for packed in matrices)
