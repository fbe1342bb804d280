"""The proof on a card: faults are caught, and no part ends another one. No kernel runs here, and no card is needed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_proof import __main__ as proof
from benchmarks.gpu_proof.parts import PARTS, SANITIZED, Part
from benchmarks.gpu_proof.settings import Settings
from benchmarks.gpu_proof.table import results_text

MAX_FILES = 8
"""A host that lends a card may send no more files back."""


def faulty(name: str, deadline_s: float = 60) -> Part:
    return Part(f"tests.unit.gpu_proof_faults:{name}", deadline_s)


def run(folder: Path, parts: dict[str, Part], deadline_s: float = 100) -> dict[str, Any]:
    settings = Settings(device="interpreted", is_toy=True, seed=3, out=str(folder))
    return proof.run_proof(settings, parts, deadline_s)


def test_a_part_that_crashes_or_hangs_ends_no_other(tmp_path: Path) -> None:
    parts = {"crash": faulty("crash"), "hang": faulty("hang", 2), "nothing": faulty("nothing"), "good": faulty("good")}
    result = run(tmp_path, parts)
    statuses = {name: part["status"] for name, part in result["parts"].items()}
    assert statuses == {
        "crash": "crashed with exit code -6",
        "hang": "stopped at its deadline of 2 s",
        "nothing": "checked nothing",
        "good": "passed",
    }
    assert not result["is_passed"]
    assert result["parts"]["hang"]["tables"] == {"A table": [{"rows": 7}]}, "what it had found before is kept"
    assert result["parts"]["crash"]["checks"][0]["name"] == "before the crash"
    text = (tmp_path / "table.txt").read_text()
    assert all(status in text for status in statuses.values())


def test_wrong_kernels_are_caught_and_the_others_still_run(tmp_path: Path) -> None:
    result = run(tmp_path, {"faulty": faulty("kernels"), "good": faulty("good")})
    details = {check["name"]: check["detail"] for check in result["parts"]["faulty"]["checks"]}
    assert re.fullmatch(r"the error's norm is .*; a number is off by 1\.0e-01 of the largest", details.pop("wrong"))
    assert details == {
        "race": "two runs differ: a race",
        "unwritten": "a number is not finite, or was not written",
        "raises": "ValueError: no kernel takes this",
        "right": "",
    }
    assert result["parts"]["faulty"]["status"] == "4 of 5 checks failed"
    assert result["parts"]["good"]["status"] == "passed"
    assert not result["is_passed"]


def test_parts_that_have_no_time_left_are_not_run(tmp_path: Path) -> None:
    result = run(tmp_path, {"hang": faulty("hang"), "good": faulty("good")}, deadline_s=2)
    assert result["parts"]["hang"]["status"] == "stopped at its deadline of 2 s"
    assert result["parts"]["good"]["status"] == "not run: no time was left"
    assert not result["is_passed"]


def test_what_is_not_installed_is_left_out_and_said(tmp_path: Path) -> None:
    result = run(tmp_path, {"absent": faulty("absent"), "good": faulty("good")})
    assert result["parts"]["absent"]["status"] == "left out: the library is not installed"
    assert result["is_passed"]


@pytest.mark.parametrize(("names", "exit_code"), [("good", 0), ("good,crash", 1)])
def test_the_exit_code_tells(
    names: str, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table comes last, and the folder has few files."""
    monkeypatch.setattr(proof, "PARTS", {"good": faulty("good"), "crash": faulty("crash")})
    command = ["gpu_proof", "--device", "interpreted", "--parts", names, "--out", str(tmp_path), "--seed", "5"]
    monkeypatch.setattr(sys, "argv", command)
    assert proof.main() == exit_code
    printed = capsys.readouterr().out
    assert printed.startswith("seed 5,")
    assert printed.endswith((tmp_path / "table.txt").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "result.json", "table.txt"}


def test_a_run_never_leaves_more_files_than_come_back() -> None:
    """Each part's own file, the log, and two that are written last, when those of the parts are gone."""
    assert len(PARTS) + 1 <= MAX_FILES


def test_all_parts_end_in_time() -> None:
    """A command on a lent host may take ten minutes, with a sanitizer too."""
    assert proof.DEADLINE_S <= 480
    assert proof.DEADLINE_S + SANITIZED.deadline_s < 600


def test_an_unknown_part_is_told() -> None:
    with pytest.raises(SystemExit, match="no part is called nonsense: there are card, compile"):
        proof.chosen_parts("card,nonsense", is_sanitizing=False)
    assert [*proof.chosen_parts("model,card", is_sanitizing=False)] == ["card", "model"]
    assert "sanitizer" in proof.chosen_parts(None, is_sanitizing=True)


def test_only_a_measured_run_gives_tuning_data(tmp_path: Path) -> None:
    """Not one in the interpreter, whatever its parts say."""
    tuning = [{"layout": "dense"}]
    for is_measured in (True, False):
        folder = tmp_path / str(is_measured)
        folder.mkdir()
        result = {"facts": {"tuning": tuning}, "is_measured": is_measured, "parts": {}, "card": "a card"}
        proof._write(folder, {**result, "date": "2027-01-31", "versions": {}, "seed": 1})
        assert (folder / "tuning.json").exists() == is_measured
    assert json.loads((tmp_path / "True" / "tuning.json").read_text()) == tuning


def test_a_table_says_when_nothing_was_measured(tmp_path: Path) -> None:
    result = run(tmp_path, {"good": faulty("good")})
    assert "say nothing of any card" in results_text(result)
    assert "say nothing of any card" not in results_text({**result, "is_measured": True})
