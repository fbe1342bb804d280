"""Models with experts in every format: the checks of `tests/contract/test_families.py`, and some kernels to compile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.test_families import (
    SHARDED,
    SPARSE,
    STORED,
    FolderOf,
    check_programs,
    check_references,
    check_shards,
    check_stored_weights,
    folder_of,
)

pytestmark = pytest.mark.parametrize("family", SPARSE)
__all__ = ["folder_of"]


@pytest.mark.parametrize("layout", STORED)
def test_quantised_checkpoints(family: str, layout: str, folder_of: FolderOf, tmp_path: Path) -> None:
    check_stored_weights(folder_of(family, layout), tmp_path)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantized_while_loading(family: str, method: str, folder_of: FolderOf) -> None:
    check_references(folder_of(family, "float32"), method)


@pytest.mark.parametrize("layout", SHARDED)
def test_shards(family: str, layout: str, folder_of: FolderOf) -> None:
    check_shards(folder_of(family, layout), layout)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_programs(family: str, method: str, folder_of: FolderOf) -> None:
    check_programs(folder_of(family, "bfloat16"), method)
