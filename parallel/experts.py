"""The matrices of a layer's experts: each expert's are loaded and cut as any, and all run as one grouped product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from parallel.linear import Cut, MakeAdapters, ParallelMatrices, RowParallelLinear
from parallel.state import ParallelState
from quant.base import GroupedKernel, LowRankKernel, LowRankUpdate, PackedWeight, RowGroups

GroupedChooser = Callable[[Sequence[PackedWeight]], GroupedKernel]
"""Makes the kernel of as many matrices as there are experts. Raises ValueError if none takes them."""


class ExpertMatrices:
    """The same matrices of every expert. A part is an expert's number times the parts of one expert, plus its part."""

    def __init__(self, experts: Sequence[ParallelMatrices], num_parts: int, kernels: GroupedChooser) -> None:
        """Each of `experts` has `num_parts` parts."""
        self._experts = experts
        self._num_parts = num_parts
        self._chooser = kernels
        self._kernels: list[GroupedKernel] = []
        self._adapters: LowRankKernel | None = None

    def _place(self, part: int) -> tuple[ParallelMatrices, int]:
        expert, own_part = divmod(part, self._num_parts)
        return self._experts[expert], own_part

    def decides_order(self, name: str, part: int) -> bool:
        matrices, part = self._place(part)
        return matrices.decides_order(name, part)

    def cut(self, name: str, part: int, shape: Sequence[int]) -> Cut | None:
        matrices, part = self._place(part)
        return matrices.cut(name, part, shape)

    def is_copied(self, name: str, part: int, checkpoint_dtype: torch.dtype) -> bool:
        matrices, part = self._place(part)
        return matrices.is_copied(name, part, checkpoint_dtype)

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        matrices, part = self._place(part)
        matrices.load(name, part, tensor)

    def missing(self, part: int) -> list[str]:
        if self._kernels:
            return []
        matrices, part = self._place(part)
        return matrices.missing(part)

    def finish(self, device: torch.device) -> None:
        """Move to the device and choose the kernels. Raises ValueError."""
        packed = [matrices.packed(device) for matrices in self._experts]
        counts = {len(each) for each in packed}
        if len(counts) > 1:
            raise ValueError("some experts have matrices that can be joined and others have not")
        self._kernels = [self._chooser(alike) for alike in zip(*packed, strict=True)]

    def matrix_shape(self, part: int) -> tuple[int, int]:
        """Outputs and inputs of the whole matrix."""
        matrices, part = self._place(part)
        return matrices.matrix_shape(part)

    def allocate_adapters(self, make: MakeAdapters) -> int:
        """Have memory for adapters, once the weights are there: its bytes."""
        self._adapters = self._experts[0].make_adapters(make, len(self._experts))
        return self._adapters.num_bytes

    def put_adapter(self, slot: int, updates: Sequence[LowRankUpdate | None]) -> None:
        """Let a slot have this rank's part of the changes of each whole matrix, part after part; None: no change."""
        assert self._adapters is not None, "called before allocate_adapters"
        num_experts, num_parts = len(self._experts), self._num_parts
        for expert, matrices in enumerate(self._experts):
            own = updates[expert * num_parts : (expert + 1) * num_parts]
            self._adapters.put(slot * num_experts + expert, matrices.cut_updates(own))

    @property
    def is_host_driven(self) -> bool:
        """Whether the host reads how many rows each expert has."""
        return any(kernel.is_host_driven for kernel in self._kernels)

    def __call__(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """x [rows, this rank's inputs] -> [rows, this rank's outputs, part after part]; each row has one expert."""
        products = [kernel(x, groups) for kernel in self._kernels]
        y = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        if self._adapters is not None:
            self._adapters.add_to(y, x, groups)
        return y


class RowParallelExperts(ExpertMatrices):
    """One matrix of every expert, whose inputs are split over the ranks (`linear.RowParallelLinear`).

    What the experts say to a token is mixed before ranks exchange it: one row for each token crosses, not one for each
    of its experts. If the groups of inputs are unordered in one expert's matrix, all gather.
    """

    def __init__(self, experts: Sequence[RowParallelLinear], parallel: ParallelState, kernels: GroupedChooser) -> None:
        super().__init__(experts, 1, kernels)
        self._matrices = experts
        self._parallel = parallel

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        super().load(name, part, tensor)
        if self._matrices[part].output_widths is not None and self.decides_order(name, part):
            for matrix in self._matrices:
                if matrix.output_widths is None:
                    matrix.gather()

    def mixed(self, x: torch.Tensor, groups: RowGroups, mix: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """x [rows, this rank's inputs] -> [tokens, out_features], alike on every rank; `mix` joins a token's rows."""
        first = self._matrices[0]
        if first.output_widths is None:
            return self._parallel.all_reduce(mix(self(x, groups)))
        mixed = mix(self(self._parallel.all_gather(x, first.input_widths), groups))
        return self._parallel.all_gather(mixed, first.output_widths)


def numbered(num_experts: int, names: Sequence[str]) -> list[tuple[str, int]]:
    """The names of all experts' parts, `0.gate_proj`, with the number of each in `ExpertMatrices`."""
    pairs = itertools.product(range(num_experts), names)
    return [(f"{expert}.{name}", part) for part, (expert, name) in enumerate(pairs)]
