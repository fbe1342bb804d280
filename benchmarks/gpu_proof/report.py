"""What a part found: checks, rows of tables and facts. Written after each entry, so that a deadline loses nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Report:
    """A part's findings, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = time.monotonic()
        self.checks: list[dict[str, Any]] = []
        """`name`, `is_ok` and `detail` of each check."""
        self.tables: dict[str, list[dict[str, Any]]] = {}
        """Title -> rows, each from column to value."""
        self.facts: dict[str, Any] = {}

    def check(self, name: str, complaints: list[str]) -> None:
        """Note a check: it passes if there are no complaints."""
        self.checks.append({"name": name, "is_ok": not complaints, "detail": "; ".join(complaints)})
        self._print("FAILED" if complaints else "ok", name, "; ".join(complaints))
        self._write()

    def row(self, title: str, **columns: Any) -> None:
        """Note a row of the table `title`."""
        self.tables.setdefault(title, []).append(columns)
        self._print(title, columns)
        self._write()

    def fact(self, **facts: Any) -> None:
        """Note what other parts or readers need to know."""
        self.facts |= facts
        self._write()

    def leave_out(self, reason: str) -> None:
        """Say why the part has nothing to do here, which is no failure."""
        self.fact(left_out=reason)

    def _print(self, *texts: object) -> None:
        print(f"{time.monotonic() - self._started:6.1f} s ", *texts, flush=True)

    def _write(self) -> None:
        content = {"checks": self.checks, "tables": self.tables, "facts": self.facts}
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content))
        unfinished.replace(self._path)  # a reader never sees half of it
