"""The reader of the package `gguf`, held to what a file has.

The package takes on trust what a file says of its own lengths: for an array of 2**60 numbers in a file of a kilobyte it
would make one empty part after the other until no memory is left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFReader

MAX_PARTS = 1 << 22
"""Numbers and texts that the metadata may have. Those of 250,000 tokens and their merges are 1,300,000 parts, and each
takes some hundred bytes while it is read."""


class BoundedReader(GGUFReader):  # type: ignore[misc]  # the package has no types
    """Raises ValueError where the file ends before what it announces, and for more metadata than any model has."""

    def __init__(self, path: Path) -> None:
        self._num_parts = 0
        super().__init__(path)

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: None | Literal["I", "S", "<"] = None
    ) -> np.ndarray[Any, Any]:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise ValueError(f"its metadata has more than {MAX_PARTS} parts")
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, within what begins at {offset}")
        part: np.ndarray[Any, Any] = super()._get(offset, dtype, count, override_order)
        return part

    @property
    def is_swapped(self) -> bool:
        """Whether the file has the byte order that this machine has not."""
        return bool(self.byte_order == "S")
