"""What a proposer of drafts takes and gives. Apart from `ngram`, whose Numba a host with a GPU may lack."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

MAX_MATCH = 16
"""A longer match says no more about what follows."""

IntArray = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next, and how many tokens of the sequence's end stood before them elsewhere."""

    token_ids: list[int]
    match_length: int
