"""Tiles that were measured on a card are taken where they fit, and a file that has none says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant.base import FormatError
from quant.kernels.tuning import (
    ENOUGH_PROGRAMS,
    TUNED_TILES,
    Tile,
    WeightShape,
    default_tile,
    read_tuned_tiles,
    tile_for,
    tuned_tile,
)

DOWN = WeightShape("int4", 3584, 18_944, 128)
TILE = {"block_outputs": 16, "block_inputs": 64, "splits": 3, "num_warps": 8, "num_stages": 5}


def entry(**changes: Any) -> dict[str, Any]:
    shape = {"layout": "int4", "num_outputs": 3584, "num_inputs": 18_944, "group_size": 128}
    return {"architecture": "sm_90", **shape, "tile": TILE} | changes


def write(folder: Path, content: Any) -> Path:
    path = folder / "tiles.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_nearest_measured_weight_of_the_card_gives_the_tile(tmp_path: Path) -> None:
    other = entry(num_outputs=8192, tile={**TILE, "splits": 1})
    tuned = read_tuned_tiles(write(tmp_path, [entry(), other, entry(architecture="sm_80", tile={**TILE, "splits": 9})]))
    assert tuned_tile(tuned, DOWN, "sm_90", 32) == Tile(**TILE)
    assert tuned_tile(tuned, WeightShape("int4", 7168, 18_944, 128), "sm_90", 32) == Tile(**{**TILE, "splits": 1})


@pytest.mark.parametrize(
    ("weight", "architecture"),
    [
        (DOWN, "sm_89"),
        (DOWN, None),
        (WeightShape("int8", 3584, 18_944, 128), "sm_90"),
        (WeightShape("int4", 3584, 18_944, 64), "sm_90"),
        (WeightShape("int4", 3584, 18_944, 128, is_gathered=True), "sm_90"),
        (WeightShape("int4", 3584, 3584, 128), "sm_90"),
    ],
    ids="card none layout group order size".split(),
)
def test_others_have_the_default(tmp_path: Path, weight: WeightShape, architecture: str | None) -> None:
    assert tuned_tile(read_tuned_tiles(write(tmp_path, [entry()])), weight, architecture, 32) is None


def test_a_tile_that_the_kernel_does_not_take_is_passed_over(tmp_path: Path) -> None:
    tuned = read_tuned_tiles(write(tmp_path, [entry(tile={**TILE, "block_inputs": 16})]))
    assert tuned_tile(tuned, DOWN, "sm_90", 32) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no", "Expecting value"),
        ([entry(tile={**TILE, "block_inputs": 48})], "block_inputs of a tile is 48"),
        ([entry(tile={**TILE, "splits": 0})], "splits of a tile is 0"),
        ([entry(tile={**TILE, "block_outputs": 8})], "8 x 64 is too small"),
        ([entry(num_outputs=0)], "num_outputs of a weight is 0"),
        ([entry(num_inputs="64")], "num_inputs of a weight is '64'"),
        ([entry(tile={**TILE, "num_warps": True})], "num_warps of a tile is True"),
        ([entry(tile={**TILE, "num_warps": 1024})], "num_warps of a tile is 1024"),
        ("[" * 100_000, "recursion"),
        ([entry(rows=1)], "unexpected keyword argument 'rows'"),
        ([{"layout": "int4"}], "architecture"),
        (["int4"], "sequence"),
    ],
    ids="json power splits small no-outputs no-number bool warps deep rows architecture list".split(),
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=f"tiles.json is not a list of measured tiles: .*{reason}"):
        read_tuned_tiles(write(tmp_path, content))


def test_our_own_file_can_be_read_and_is_asked() -> None:
    for architecture, weight, tile in read_tuned_tiles(TUNED_TILES):
        assert tile_for(weight, architecture, min_inputs=16) == tile


@pytest.mark.parametrize(("num_outputs", "block_outputs"), [(896, 16), (3584, 16), (8192, 32), (37_888, 64)])
def test_default_tiles_make_programs_enough_without_splits(num_outputs: int, block_outputs: int) -> None:
    for layout in ("dense", "int8", "int4"):
        tile = default_tile(WeightShape(layout, num_outputs, 3584), 32)
        assert (tile.block_outputs, tile.splits) == (block_outputs, 1)
        assert block_outputs == 16 or num_outputs // block_outputs >= ENOUGH_PROGRAMS
