"""The results of `make gpu-proof` that are kept, and the README's rows about GPUs, which are made of them alone.

    python benchmarks/gpu_results.py [--keep FOLDER] [--check]

--keep takes a finished run's folder into docs/gpu-results, under the card's name and the date; a run in the
interpreter, with toy sizes or with a failed check is refused. Then the rows are written into README.md, or with
--check only compared: exit code 1 where they differ, or where a line beside them names a card.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "docs" / "gpu-results"
DOCUMENT = REPOSITORY / "README.md"
BEGIN = "<!-- rows of docs/gpu-results, written by benchmarks/gpu_results.py -->"
END = "<!-- end of the rows -->"
CARD = re.compile(r"\b(?:RTX|GTX|Tesla|GeForce|[ABHL]\d{2,3}S?|GB?[12]00|MI\d{3})\b")
"""A card's name in a line of the README."""
DECODE = "Decode, 1024 tokens known"
"""The table of a run from which the row is made."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The runs that are kept, the latest first."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(results, key=lambda result: str(result["date"]), reverse=True)


def complaints_of(result: Mapping[str, Any]) -> list[str]:
    """Why a run must not be kept."""
    complaints = []
    if not result["is_measured"]:
        complaints.append("it was interpreted, or had toy sizes: its times say nothing of a card")
    if not result["is_passed"]:
        failed = [name for name, part in result["parts"].items() if part["status"] != "passed"]
        complaints.append(f"parts have not passed: {', '.join(failed)}")
    if not result["parts"].get("model", {}).get("tables", {}).get(DECODE):
        complaints.append(f"it has no table {DECODE!r} of the part `model`")
    return complaints


def keep(run: Path, folder: Path) -> Path:
    """Copy the results and the table of a run; returns the file of results. Raises SystemExit for a refused run."""
    if not (run / "result.json").is_file():
        raise SystemExit(f"{run} has no result.json: run `make gpu-proof` first, or name the folder of a run")
    result = json.loads((run / "result.json").read_text())
    if complaints := complaints_of(result):
        raise SystemExit(f"{run} can't be kept: {'; '.join(complaints)}")
    name = re.sub(r"[^A-Za-z0-9]+", "-", result["card"]).strip("-")
    target = folder / f"{name}-{result['date']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text((run / "result.json").read_text())
    target.with_suffix(".md").write_text((run / "table.txt").read_text())
    return target


def rows_of(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's rows in Markdown; empty where there is no run."""
    if not results:
        return ""
    lines = [
        "Qwen2-7B's shapes with random weights, 1,024 tokens known, milliseconds of a step (`make gpu-proof`):",
        "",
        "| card, date | form | one sequence | floor over time |",
        "|---|---|---|---|",
    ]
    for result in results:
        for row in result["parts"]["model"]["tables"][DECODE]:
            if row["sequences"] == 1:
                about = f"{result['card']}, {result['date']}"
                lines.append(f"| {about} | {row['model']} | {row['ms']} ms | {row['floor/time']} |")
    return "\n".join(lines)


def with_rows(document: str, rows: str) -> str:
    """The document with these rows between its marks. Raises ValueError where it lacks a mark."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError("README.md must have both marks of the rows once")
    before, _, rest = document.partition(BEGIN)
    between = f"\n\n{rows}\n\n" if rows else "\n"
    return f"{before}{BEGIN}{between}{END}{rest.partition(END)[2]}"


def document_complaints(document: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows that are not those of the results, and lines beside them that name a card."""
    right = with_rows(document, rows_of(results))
    complaints = [] if document == right else ["README.md has other rows than docs/gpu-results gives"]
    before, _, rest = right.partition(BEGIN)
    others = [*before.splitlines(), *rest.partition(END)[2].splitlines()]
    complaints += [f"README.md names a card by hand: {line}" for line in others if CARD.search(line)]
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a finished run, as build/gpu-proof")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    if arguments.keep:
        print(keep(arguments.keep, FOLDER))
    results = read_results(FOLDER)
    if not arguments.check:
        DOCUMENT.write_text(with_rows(DOCUMENT.read_text(), rows_of(results)))
    complaints = document_complaints(DOCUMENT.read_text(), results)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return min(len(complaints), 1)


if __name__ == "__main__":
    sys.exit(main())
