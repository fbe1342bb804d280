"""The shapes of Qwen2, and numbers of ranks, that `tests/contract/test_sharded.py` leaves out, in every layout."""

from __future__ import annotations

import pytest

from tests.contract.test_sharded import (
    FEW_SHAPES,
    LAYOUTS,
    QUANTIZED,
    SHAPES,
    SIZES,
    FolderOf,
    check_as_stored,
    check_float32,
    folder_of,
)

__all__ = ["folder_of"]

OTHERS = [shape for shape in SHAPES if shape not in FEW_SHAPES]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", OTHERS)
def test_float32(shape: str, layout: str, folder_of: FolderOf) -> None:
    check_float32(folder_of(shape, layout), layout, SIZES)


@pytest.mark.parametrize("layout", ["bfloat16", *QUANTIZED])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_stored(shape: str, layout: str, folder_of: FolderOf) -> None:
    check_as_stored(folder_of(shape, layout), layout, SIZES)
