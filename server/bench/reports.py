"""A report in each of its forms: JSON, Markdown, and a page of HTML with its plots inside."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from server.bench.charts import Points, line_chart

TITLE = "text-generation-benchmark"
STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}tr{border-bottom:1px solid #ddd}"
    "td,th{padding:.2em .8em;text-align:left;white-space:nowrap}"
    ".number{text-align:right;font-variant-numeric:tabular-nums}svg{display:block;margin-top:2em}"
)
NUMBER = re.compile(r"[\d.]+( \(.+ to .+\))?|not said|")
"""What stands in a column of numbers: one, perhaps with its interval, or none."""


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def are_numbers(self) -> list[bool]:
        """Whether a column has numbers, which stand on the right."""
        return [all(NUMBER.fullmatch(row[index]) for row in self.rows) for index in range(len(self.columns))]


@dataclass(frozen=True)
class Chart:
    title: str
    series: Mapping[str, Points]
    x_label: str


@dataclass(frozen=True)
class Report:
    """What a benchmark found."""

    data: Mapping[str, Any]
    """All numbers, for programs."""
    tables: Sequence[Table]
    charts: Sequence[Chart] = field(default_factory=list)
    notes: Sequence[str] = field(default_factory=list)
    """Sentences that a reader of the numbers needs."""


def as_json(report: Report) -> str:
    return json.dumps({**report.data, "notes": list(report.notes)}, indent=2) + "\n"


def as_markdown(report: Report) -> str:
    parts = [f"# {TITLE}"]
    for table in report.tables:
        cells = [table.columns, ["---:" if is_number else "---" for is_number in table.are_numbers], *table.rows]
        lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
        parts.append(f"## {table.title}\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, *report.notes]) + "\n"


def as_html(report: Report) -> str:
    parts = [f'<!doctype html><meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style><h1>{TITLE}</h1>']
    for table in report.tables:
        kinds = [' class="number"' if is_number else "" for is_number in table.are_numbers]
        rows = [
            _html_row(cells, kinds, tag) for tag, cells in [("th", table.columns), *(("td", r) for r in table.rows)]
        ]
        parts.append(f"<h2>{escape(table.title)}</h2><table>{''.join(rows)}</table>")
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    parts += [line_chart(chart.title, chart.series, chart.x_label) for chart in report.charts]
    return "\n".join(parts) + "\n"


def _html_row(cells: Sequence[str], kinds: Sequence[str], tag: str) -> str:
    return (
        f"<tr>{''.join(f'<{tag}{kind}>{escape(text)}</{tag}>' for text, kind in zip(cells, kinds, strict=True))}</tr>"
    )


WRITERS: dict[str, Callable[[Report], str]] = {".json": as_json, ".md": as_markdown, ".html": as_html}
"""Ending of a file's name -> what writes it."""


def write_report(report: Report, path: Path) -> None:
    """Raises OSError."""
    path.write_text(WRITERS[path.suffix](report), encoding="utf-8")
