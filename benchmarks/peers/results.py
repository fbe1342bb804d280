"""Rows as they come, in a file after each, so that an interrupted run can go on where it ended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.report import print_row
from benchmarks.peers.works import Row


class OtherRunError(Exception):
    """The file is from a run with other settings."""


class Results:
    """The rows of a run and, in `not_measured`, what is missing and why; `about` says how they are measured."""

    def __init__(self, path: Path, about: Mapping[str, Any], *, is_continued: bool = False) -> None:
        """Raises OtherRunError if a run is to go on that was `about` something else."""
        self._path, self.about = path, about
        self.rows: list[Row] = []
        self.not_measured: list[str] = []
        if is_continued and path.exists():
            saved = json.loads(path.read_text())
            if saved["about"] != about:
                raise OtherRunError(f"{path} has a run with {saved['about']}, not with {about}")
            self.rows = [Row(**row) for row in saved["rows"]]
            self.not_measured = saved["not_measured"]
        self._save()

    def has(self, form: str, labels: Iterable[str]) -> bool:
        return {(form, label) for label in labels} <= {(row.form, row.label) for row in self.rows}

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print_row(row)
        self._save()

    def tell(self, line: str) -> None:
        print(line, flush=True)
        if line not in self.not_measured:
            self.not_measured.append(line)
            self._save()

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(row) for row in self.rows]
        saved = {"about": self.about, "rows": rows, "not_measured": self.not_measured}
        self._path.write_text(json.dumps(saved, indent=1) + "\n")

    def as_json(self) -> dict[str, Any]:
        rows = [
            {"form": row.form, "work": row.label, **row.rates, "best": row.best_peer, "ratio": row.ratio}
            | {"demanded": row.demanded, "passed": row.has_passed}
            for row in self.rows
        ]
        return {**self.about, "rows": rows, "not_measured": self.not_measured, "passed": self.has_passed}

    @property
    def has_passed(self) -> bool:
        return all(row.has_passed for row in self.rows)
