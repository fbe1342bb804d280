"""How a weight is cut into programs: tiles of outputs and inputs, measured ones or defaults.

`tuned_tiles.json` has what was measured on cards; it is empty as long as nothing was. A tile depends on the card and
the weight alone, never on the rows of activations that it meets, so that the order in which a row is summed does not
depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.base import FormatError
from quant.kernels.launch import IS_INTERPRETED

TUNED_TILES = Path(__file__).with_name("tuned_tiles.json")
"""A list of objects with the fields of `WeightShape`, the `architecture` and the `tile`, whose fields are `Tile`'s."""
MAX_DISTANCE = 1.0
"""A measured tile serves weights of at most twice or half the size; a weight as near as that has the nearest one's."""

MAX_TILE = {"block_outputs": 256, "block_inputs": 1024, "splits": 64, "num_warps": 16, "num_stages": 8}
"""The most of each of a tile's numbers that a card may have a use for."""
MAX_BLOCK_INPUTS = 128
MIN_BLOCK = 16
ENOUGH_PROGRAMS = 1 if IS_INTERPRETED else 256
"""Programs that occupy a large card: about two for each of its 108 to 144 multiprocessors. With fewer outputs tiles are
as small as they can be: splits of the inputs would take a launch of their own. The interpreter has one program at a
time, which costs about as much with 64 outputs as with 16."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `block_outputs` outputs, over its split of the inputs, `block_inputs` at a time."""

    block_outputs: int
    block_inputs: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclasses.dataclass(frozen=True, slots=True)
class WeightShape:
    """What of a weight decides its tile."""

    layout: str
    num_outputs: int
    num_inputs: int
    group_size: int = 0
    """Inputs that have a scale; 0: all have the same, or there is none."""
    is_gathered: bool = False
    """Whether the inputs are out of order, as with act-order."""

    def distance(self, other: WeightShape) -> float:
        """Powers of two between the sizes of weights of the same kind, infinite if the kinds differ."""
        if (self.layout, self.group_size, self.is_gathered) != (other.layout, other.group_size, other.is_gathered):
            return math.inf
        ratios = self.num_outputs / other.num_outputs, self.num_inputs / other.num_inputs
        return sum(abs(math.log2(ratio)) for ratio in ratios)


Tuned = Sequence[tuple[str, WeightShape, Tile]]
"""Measured tiles with the architecture and the weight that they were measured with."""


def tile_for(weight: WeightShape, architecture: str | None = None, *, min_inputs: int) -> Tile:
    """The tile of a weight, whose blocks have at least `min_inputs` inputs, a power of two."""
    return tuned_tile(read_tuned_tiles(TUNED_TILES), weight, architecture, min_inputs) or default_tile(
        weight, min_inputs
    )


def tuned_tile(tuned: Tuned, weight: WeightShape, architecture: str | None, min_inputs: int) -> Tile | None:
    """The measured tile of the nearest weight on that architecture; None: none is near that the kernel takes."""
    distances = [(weight.distance(other), tile) for name, other, tile in tuned if name == architecture]
    nearest = min(distances, key=lambda pair: pair[0], default=None)
    is_near = nearest is not None and nearest[0] <= MAX_DISTANCE and nearest[1].block_inputs >= min_inputs
    return nearest[1] if nearest is not None and is_near else None


def default_tile(weight: WeightShape, min_inputs: int) -> Tile:
    """A tile that was not measured.

    A block of inputs lies within a group, unless no block of `min_inputs` can. Weights whose inputs are gathered need
    more registers, so fewer loads are under way at a time. With these warps compilers spill least.
    """
    block_outputs = max(size for size in (16, 32, 64) if weight.num_outputs >= size * ENOUGH_PROGRAMS or size == 16)
    if weight.layout == "dense":
        return Tile(block_outputs, 2 * MAX_BLOCK_INPUTS if block_outputs == 16 else MAX_BLOCK_INPUTS, num_warps=8)
    power_of_two = weight.group_size & -weight.group_size  # the largest that divides it
    block_inputs = max(min(power_of_two or MAX_BLOCK_INPUTS, MAX_BLOCK_INPUTS), min_inputs)
    if weight.is_gathered:
        return Tile(block_outputs, block_inputs, num_warps=8 if block_outputs == 16 else 4, num_stages=2)
    return Tile(block_outputs, block_inputs)


@functools.cache
def read_tuned_tiles(path: Path) -> Tuned:
    """The measured tiles of a file. Raises FormatError, in a sentence."""
    try:
        entries = json.loads(path.read_bytes())
        return [_read_entry(entry) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{path} is not a list of measured tiles: {error}") from error


def _read_entry(entry: Mapping[str, Any]) -> tuple[str, WeightShape, Tile]:
    fields = dict(entry)
    architecture, numbers = str(fields.pop("architecture")), dict(fields.pop("tile"))
    weight, tile = WeightShape(**fields), Tile(**numbers)
    for name in ("num_outputs", "num_inputs"):
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise ValueError(f"{name} of a weight is {fields[name]!r}")
    for name, number in numbers.items():
        is_allowed = type(number) is int and 0 < number <= MAX_TILE[name]
        if not is_allowed or (name not in ("splits", "num_stages") and number & (number - 1)):
            raise ValueError(f"{name} of a tile is {number!r}")
    if tile.block_outputs < MIN_BLOCK or tile.block_inputs < MIN_BLOCK:
        raise ValueError(f"a tile of {tile.block_outputs} x {tile.block_inputs} is too small")
    return architecture, weight, tile
