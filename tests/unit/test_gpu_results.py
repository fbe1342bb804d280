"""The README's rows about GPUs come from kept runs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_results import (
    BEGIN,
    DECODE,
    DOCUMENT,
    END,
    FOLDER,
    document_complaints,
    keep,
    read_results,
    rows_of,
    with_rows,
)

README = f"# A server\n\n{BEGIN}\n{END}\n\nMore.\n"


def a_run(folder: Path, **changes: Any) -> Path:
    """A finished run's folder."""
    decode = [
        {"model": "16 bits", "sequences": 1, "ms": 5.125, "floor/time": 0.81},
        {"model": "16 bits", "sequences": 8, "ms": 6.0, "floor/time": 0.7},
        {"model": "int8", "sequences": 1, "ms": 3.5, "floor/time": 0.6},
    ]
    result: dict[str, Any] = {
        "card": "NVIDIA H100 80GB HBM3",
        "date": "2027-01-31",
        "is_measured": True,
        "is_passed": True,
        "parts": {"model": {"status": "passed", "tables": {DECODE: decode}}},
    }
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result | changes))
    (folder / "table.txt").write_text("the table\n")
    return folder


def test_the_readme_has_the_rows_of_the_runs_that_are_kept() -> None:
    assert document_complaints(DOCUMENT.read_text(), read_results(FOLDER)) == []


def test_without_a_run_there_is_no_row(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []
    assert with_rows(README, rows_of([])) == README
    assert document_complaints(README, []) == []


def test_a_kept_run_gives_rows_with_card_and_date(tmp_path: Path) -> None:
    kept = keep(a_run(tmp_path / "run"), tmp_path / "results")
    assert kept.name == "NVIDIA-H100-80GB-HBM3-2027-01-31.json"
    assert kept.with_suffix(".md").read_text() == "the table\n"
    results = read_results(tmp_path / "results")
    document = with_rows(README, rows_of(results))
    assert "| NVIDIA H100 80GB HBM3, 2027-01-31 | 16 bits | 5.125 ms | 0.81 |" in document
    assert "| NVIDIA H100 80GB HBM3, 2027-01-31 | int8 | 3.5 ms | 0.6 |" in document
    assert "6.0" not in document
    assert document_complaints(document, results) == []
    assert with_rows(document, rows_of(results)) == document
    assert with_rows(document, "") == README


def test_a_row_without_a_run_is_found(tmp_path: Path) -> None:
    by_hand = README.replace(END, f"\n| NVIDIA H100, 2027-01-31 | 16 bits | 5.0 ms | 0.8 |\n\n{END}")
    assert document_complaints(by_hand, []) == ["README.md has other rows than docs/gpu-results gives"]
    keep(a_run(tmp_path / "run"), tmp_path / "results")
    assert document_complaints(README, read_results(tmp_path / "results")), "a kept run whose row is missing"


@pytest.mark.parametrize("card", ["RTX 4090", "an A100", "an H100", "MI300", "B200", "L40S", "Tesla"])
def test_a_card_that_is_named_beside_the_rows_is_found(card: str) -> None:
    (complaint,) = document_complaints(README + f"On {card} it takes 5 ms.\n", [])
    assert card in complaint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_measured": False}, "its times say nothing of a card"),
        (
            {"is_passed": False, "parts": {"card": {"status": "crashed with exit code 1"}}},
            "parts have not passed: card",
        ),
        ({"parts": {"card": {"status": "passed", "tables": {}}}}, "it has no table .* of the part `model`"),
    ],
)
def test_a_run_that_measured_no_card_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=reason):
        keep(a_run(tmp_path / "run", **changes), tmp_path / "results")
    assert not (tmp_path / "results").exists()
