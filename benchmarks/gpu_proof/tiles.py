"""The tiles that are tried for a weight, and the data that says which was best on this card.

A tile is chosen for 1 to 16 rows together: it must not depend on the rows, or a row's bits would depend on its company.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu_proof.weights import Form
from quant.base import PackedWeight
from quant.kernels.matrix_triton import as_indexed
from quant.kernels.skinny_triton import min_block_inputs, skinny_product
from quant.kernels.tuning import Tile, WeightShape, default_tile

TUNED_ROWS = (1, 2, 4, 8, 16)

Product = Callable[[torch.Tensor], torch.Tensor]


def weight_shape(form: Form, num_outputs: int, num_inputs: int) -> WeightShape:
    return WeightShape(form.layout, num_outputs, num_inputs, form.group_size, form.has_order)


def candidates(form: Form, num_outputs: int, num_inputs: int, *, is_toy: bool) -> list[Tile]:
    """The tile that is taken where nothing was measured first, then its neighbours."""
    default = default_tile(weight_shape(form, num_outputs, num_inputs), min_block_inputs(form.layout))
    tiles = [default]
    if is_toy:
        return tiles
    tiles += [dataclasses.replace(default, block_outputs=outputs) for outputs in (16, 32, 64, 128)]
    tiles += [dataclasses.replace(default, splits=splits) for splits in _splits(default, num_inputs)]
    tiles += [dataclasses.replace(default, num_warps=12 - default.num_warps)]
    tiles += [dataclasses.replace(default, num_stages=stages) for stages in (2, 4, 5)]
    return list(dict.fromkeys(tiles))


def _splits(default: Tile, num_inputs: int) -> Iterator[int]:
    """Half and twice as many splits, as long as each has some blocks of inputs."""
    num_blocks = -(-num_inputs // default.block_inputs)
    yield from (splits for splits in (default.splits // 2, default.splits * 2) if 1 <= splits <= num_blocks // 2)


def product_with(packed: PackedWeight, form: Form, tile: Tile) -> Product:
    """The product of few rows with the weight in this tile."""
    packed = as_indexed(packed)

    def product(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], packed.weight.shape[0], dtype=packed.out_dtype or x.dtype)
        skinny_product(packed, form.group_size, tile, x, out)
        return out

    return product


def best_tile(seconds: Mapping[Tile, Sequence[float]]) -> Tile:
    """The tile that needs least over all row counts, each of which counts alike; the first has the best chances.

    `seconds` has for each tile its times by `TUNED_ROWS`, the default tile first. Another one is taken only where it
    gains 2 %, more than two measurements of the same differ by.
    """
    default = next(iter(seconds))
    ratios = {tile: _mean_ratio(times, seconds[default]) for tile, times in seconds.items()}
    best = min(ratios, key=lambda tile: ratios[tile])
    return best if ratios[best] < 0.98 else default


def _mean_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return sum(time / other for time, other in zip(times, others, strict=True)) / len(times)


def tuning_entry(form: Form, num_outputs: int, num_inputs: int, tile: Tile, architecture: str | None) -> dict[str, Any]:
    """What quant/kernels/tuned_tiles.json says of one weight."""
    shape = dataclasses.asdict(weight_shape(form, num_outputs, num_inputs))
    return {"architecture": architecture, **shape, "tile": dataclasses.asdict(tile)}
