"""Cases of adapters' changes: rows of several adapters and of none, ranks that fill no block, matrices left alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu_proof.checks import Case, Check
from benchmarks.gpu_proof.inputs import Inputs
from quant.base import AdapterRows, LowRankKernel, LowRankShape, LowRankUpdate
from quant.kernels import make_low_rank_kernel

ROWS, TOY_ROWS = (1, 16, 17, 200), (3,)
RANKS = ([16, 16, 16], [3, 0, 5], [64, 0, 64])
"""The ranks of each adapter, matrix after matrix; 0: the matrix is left alone."""
DTYPES = (torch.bfloat16, torch.float16)


class RandomAdapters:
    """An adapter for each slot, whose changes of numbers near 1 are near 1."""

    def __init__(self, shape: LowRankShape, ranks: Sequence[Sequence[int]], generator: torch.Generator) -> None:
        """`ranks` are those of each slot, matrix after matrix; 0: the adapter does not change it."""
        self.shape = shape

        def normal(rows: int, columns: int) -> torch.Tensor:
            numbers = torch.randn(rows, columns, device=generator.device, generator=generator)
            return numbers.mul_(columns**-0.5).to(shape.dtype)

        self.updates = [
            [
                LowRankUpdate(normal(rank, shape.num_inputs), normal(size, rank), 0.75) if rank else None
                for rank, size in zip(slot_ranks, shape.num_outputs, strict=True)
            ]
            for slot_ranks in ranks
        ]

    def kernel(self, backend: str, slots: Sequence[int]) -> LowRankKernel:
        """The backend's kernel with the adapters, in a step whose rows have these slots; -1: none."""
        step = AdapterRows()
        kernel = make_low_rank_kernel(backend, self.shape, step)
        for slot, updates in enumerate(self.updates):
            kernel.put(slot, updates)
        slots_of_rows = torch.tensor(slots)
        order = slots_of_rows.argsort(stable=True)
        sorted_slots = slots_of_rows[order].tolist()
        step.rows, step.slots = (part.to(self.shape.device) for part in (order, slots_of_rows[order]))
        step.segments = [
            (slot, sorted_slots.index(slot), sorted_slots.index(slot) + sorted_slots.count(slot))
            for slot in range(len(self.updates))
            if slot in sorted_slots
        ]
        return kernel

    def expected(self, y: torch.Tensor, x: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """y with the changes, in float64."""
        result = y.double()
        for slot, updates in enumerate(self.updates):
            rows, first = [row for row, other in enumerate(slots) if other == slot], 0
            for update, size in zip(updates, self.shape.num_outputs, strict=True):
                if update is not None:
                    change = x[rows].double() @ update.a.double().T @ update.b.double().T * update.scaling
                    result[rows, first : first + size] += change
                first += size
        return result


def adapter_checks(*, is_toy: bool) -> Iterator[Check]:
    num_inputs, num_outputs = (264, [72, 24, 8]) if is_toy else (3584, [3584, 512, 520])
    for rows in TOY_ROWS if is_toy else ROWS:
        for dtype in DTYPES:
            yield _check(num_inputs, num_outputs, rows, dtype)


def _check(num_inputs: int, num_outputs: list[int], rows: int, dtype: torch.dtype) -> Check:
    name = f"adapters of {rows} rows, {num_inputs} to {num_outputs}, {str(dtype).removeprefix('torch.')}"
    return Check.of(name, lambda inputs: _case(inputs, num_inputs, num_outputs, rows, dtype))


def _case(inputs: Inputs, num_inputs: int, num_outputs: list[int], rows: int, dtype: torch.dtype) -> Case:
    max_rank = max(map(max, RANKS))
    shape = LowRankShape(num_inputs, num_outputs, len(RANKS), max_rank, dtype, inputs.device.torch_device)
    adapters = RandomAdapters(shape, RANKS, inputs.generator)
    x, y = (inputs.normal(rows, size, dtype=dtype) for size in (num_inputs, sum(num_outputs)))
    slots = (inputs.integers(len(RANKS) + 1, rows) - 1).tolist()
    kernel = adapters.kernel("triton", slots)

    def run() -> torch.Tensor:
        changed = y.clone()
        kernel.add_to(changed, x)
        return changed

    return Case(run, lambda: adapters.expected(y, x, slots))
