"""A run's results as one text: the parts, what failed, and every table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_FAILURES = 20
"""Failed checks of a part that are told one by one."""


def results_text(result: Mapping[str, Any]) -> str:
    """The whole run in Markdown."""
    lines = [f"# {result['card']}, {result['date']}", ""]
    if not result["is_measured"]:
        lines += ["**Interpreted on a CPU or with toy sizes: the times below say nothing of any card.**", ""]
    lines += [
        ", ".join(f"{name} {value}" for name, value in result["versions"].items()) + f", seed {result['seed']}",
        "",
    ]
    parts: Mapping[str, Any] = result["parts"]
    lines += _rows([_summary(name, part) for name, part in parts.items()])
    for name, part in parts.items():
        failed = [check for check in part["checks"] if not check["is_ok"]]
        lines += [f"- {name}: FAILED {check['name']}: {check['detail']}" for check in failed[:MAX_FAILURES]]
        for title, rows in part["tables"].items():
            lines += ["", f"## {title}", "", *_rows(rows)]
    return "\n".join(lines) + "\n"


def _summary(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    num_passed = sum(check["is_ok"] for check in part["checks"])
    passed = f"{num_passed} of {len(part['checks'])}"
    return {"part": name, "result": part["status"], "checks": passed, "seconds": part["seconds"]}


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table whose columns are those of all rows, in their order, and as wide as what stands in them."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    texts = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return [texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
