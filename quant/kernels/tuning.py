"""How a weight is cut into programs: tiles of outputs and inputs, by layout and shape. Not tuned on hardware.

A tile depends on the weight alone, never on the rows of activations that it meets, so that the order in which a row is
summed does not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses

FEW_OUTPUTS = 8192
MAX_BLOCK_INPUTS = 128
MAX_SPLITS = 8
MIN_BLOCKS_PER_SPLIT = 4
ENOUGH_PROGRAMS = 256
"""Programs that occupy a large card: about two for each of its 108 to 144 multiprocessors."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `block_outputs` outputs, over its split of the inputs, `block_inputs` at a time."""

    block_outputs: int
    block_inputs: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3


def tile_for(num_outputs: int, num_inputs: int, *, group_size: int, min_inputs: int) -> Tile:
    """The tile of a weight with a scale for every `group_size` inputs; `min_inputs` is a power of two.

    A block of inputs lies within a group, unless no block of `min_inputs` can.
    """
    is_one_group = group_size == num_inputs
    block_inputs = MAX_BLOCK_INPUTS if is_one_group else min(group_size & -group_size, MAX_BLOCK_INPUTS)
    block_inputs = max(block_inputs, min_inputs)
    block_outputs = 32 if num_outputs < FEW_OUTPUTS else 64
    programs = -(-num_outputs // block_outputs)
    blocks = -(-num_inputs // block_inputs)
    splits = max(1, min(MAX_SPLITS, ENOUGH_PROGRAMS // programs, blocks // MIN_BLOCKS_PER_SPLIT))
    return Tile(block_outputs, block_inputs, splits)
