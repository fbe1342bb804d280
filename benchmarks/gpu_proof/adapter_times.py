"""What adapters add to a layer of Qwen2-7B: both implementations, by rows, and over the bytes of A and B."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from benchmarks.floors import QWEN2_7B
from benchmarks.gpu_proof.adapter_cases import RandomAdapters
from benchmarks.gpu_proof.card import Ceilings
from benchmarks.gpu_proof.clock import call_seconds
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.report import Report
from engine.device import DTYPES
from quant.base import LowRankShape

NUM_ADAPTERS = 3
RANKS, TOY_RANKS = (16, 64), (16,)
ROWS, TOY_ROWS = (1, 8, 32, 128, 512), (2,)
NUM_LAYERS = 24
"""Layers whose adapters are read one after the other, so that none is in the cache when its turn comes again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Matrices with a common input."""

    num_inputs: int
    num_outputs: Sequence[int]


def places(*, is_toy: bool) -> list[Place]:
    """The places of a layer."""
    if is_toy:
        return [Place(64, [64, 8, 8])]
    model = QWEN2_7B
    queries, keys = (count * model.head_dim for count in (model.num_heads, model.num_kv_heads))
    return [
        Place(model.hidden, [queries, keys, keys]),
        Place(queries, [model.hidden]),
        Place(model.hidden, [model.inner, model.inner]),
        Place(model.inner, [model.hidden]),
    ]


def time_adapters(inputs: Inputs, ceilings: Ceilings, report: Report) -> None:
    """A row for each rank, number of rows and implementation."""
    for rank in TOY_RANKS if inputs.is_toy else RANKS:
        for rows in TOY_ROWS if inputs.is_toy else ROWS:
            for backend in ("triton", "torch"):
                _time(inputs, rank, rows, backend, ceilings, report)


def _time(inputs: Inputs, rank: int, rows: int, backend: str, ceilings: Ceilings, report: Report) -> None:
    dtype, layer = DTYPES[inputs.device.half_dtype], places(is_toy=inputs.is_toy)
    slots = [row % NUM_ADAPTERS for row in range(rows)]
    layers = [_layer(inputs, layer, rank, slots, backend, dtype) for _ in range(1 if inputs.is_toy else NUM_LAYERS)]
    seconds = call_seconds(inputs.device, layers)
    num_numbers = sum(
        min(rows, NUM_ADAPTERS) * rank * (len(place.num_outputs) * place.num_inputs + sum(place.num_outputs))
        for place in layer
    )
    moved = 2 * sum(rows * (place.num_inputs + 2 * sum(place.num_outputs)) for place in layer)
    floor_s = ceilings.floor_s(dtype.itemsize * num_numbers + moved, 0)
    report.row(
        f"Adapters: what {NUM_ADAPTERS} add to a layer",
        rank=rank,
        rows=rows,
        kernel=backend,
        us=round(seconds * 1e6, 1),
        **{"floor over time": round(floor_s / seconds, 3)},
    )


def _layer(
    inputs: Inputs, layer: Sequence[Place], rank: int, slots: Sequence[int], backend: str, dtype: torch.dtype
) -> Callable[[], None]:
    """Adds all changes of a layer."""
    calls = []
    for place in layer:
        device = inputs.device.torch_device
        shape = LowRankShape(place.num_inputs, place.num_outputs, NUM_ADAPTERS, rank, dtype, device)
        ranks = [[rank] * len(place.num_outputs)] * NUM_ADAPTERS
        kernel = RandomAdapters(shape, ranks, inputs.generator).kernel(backend, slots)
        x, y = (inputs.normal(len(slots), size, dtype=dtype) for size in (place.num_inputs, sum(place.num_outputs)))
        calls.append((kernel, y, x))

    def run() -> None:
        for kernel, y, x in calls:
            kernel.add_to(y, x)

    return run
