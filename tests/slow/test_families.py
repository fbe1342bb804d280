"""Families in every format: the checks of `tests/contract/test_families.py`, and some kernels to compile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.kernels.test_grouped_cpu import check_bits
from tests.contract.oracles import FAMILIES
from tests.contract.test_families import (
    CUT,
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

__all__ = ["folder_of"]


@pytest.mark.parametrize("layout", STORED)
@pytest.mark.parametrize("family", SPARSE)
def test_quantised_checkpoints(family: str, layout: str, folder_of: FolderOf, tmp_path: Path) -> None:
    check_stored_weights(folder_of(family, layout), tmp_path)


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", SPARSE)
def test_quantized_while_loading(family: str, method: str, folder_of: FolderOf) -> None:
    check_references(folder_of(family, "float32"), method)


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in FAMILIES for layout in SHARDED if (family, layout) not in CUT],
)
def test_shards(family: str, layout: str, folder_of: FolderOf) -> None:
    check_shards(folder_of(family, layout), layout)


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", SPARSE)
def test_programs(family: str, method: str, folder_of: FolderOf) -> None:
    check_programs(folder_of(family, "bfloat16"), method)


@pytest.mark.parametrize(
    ("layout", "is_exact"), [("int8", True), ("int4", True), ("fp8", True), ("int8", False), ("int4", False)]
)
def test_bits_of_grouped_products(layout: str, is_exact: bool) -> None:
    check_bits(layout, is_exact=is_exact)
