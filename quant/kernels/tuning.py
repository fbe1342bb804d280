"""How a weight is cut into programs: tiles of outputs and inputs, by layout and shape. Not tuned on hardware.

A tile depends on the weight alone, never on the rows of activations that it meets, so that the order in which a row is
summed does not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses

MAX_BLOCK_INPUTS = 128
ENOUGH_PROGRAMS = 256
"""Programs that occupy a large card: about two for each of its 108 to 144 multiprocessors. With fewer outputs tiles are
as small as they can be: splits of the inputs would take a launch of their own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `block_outputs` outputs, over its split of the inputs, `block_inputs` at a time."""

    block_outputs: int
    block_inputs: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


def tile_for(
    num_outputs: int, num_inputs: int, *, group_size: int, min_inputs: int, is_dense: bool, is_gathered: bool = False
) -> Tile:
    """The tile of a weight with a scale for every `group_size` inputs, or 0; `min_inputs` is a power of two.

    A block of inputs lies within a group, unless no block of `min_inputs` can. Weights whose inputs are gathered
    (`is_gathered`) need more registers, so fewer loads are under way at a time. With these warps compilers spill least.
    """
    block_outputs = max(size for size in (16, 32, 64) if num_outputs >= size * ENOUGH_PROGRAMS or size == 16)
    if is_dense:
        return Tile(block_outputs, 2 * MAX_BLOCK_INPUTS if block_outputs == 16 else MAX_BLOCK_INPUTS, num_warps=8)
    power_of_two = group_size & -group_size  # the largest that divides it
    block_inputs = max(min(power_of_two or MAX_BLOCK_INPUTS, MAX_BLOCK_INPUTS), min_inputs)
    return Tile(block_outputs, block_inputs, num_stages=2 if is_gathered else 3)
