"""Rows in words: a line each while it runs, tables in Markdown for docs/performance.md and README.md."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.documents import processor, with_part
from benchmarks.peers.servers import SERVERS
from benchmarks.peers.table import PEERS
from benchmarks.peers.works import BOUND, LONG_ROUNDS, OURS, Row

REPOSITORY = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- made by make peers -->", "<!-- end of what make peers made -->"
README_WORKS = ("prompt of 512", "decode 1 sequence after 512", "HTTP, 16 streams: tokens/s")


def print_row(row: Row) -> None:
    figures = ", ".join(f"{name} {rate:g}" for name, rate in row.rates.items())
    verdict = f"ratio {row.ratio}, demanded {row.demanded}" if row.best_peer else "no peer"
    print(f"{row.form:7s}{row.label}: {figures}: {verdict}{'' if row.has_passed else ': FAILED'}", flush=True)


def table_lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def measured_table(rows: Sequence[Row]) -> list[str]:
    """A line for each work and form, a column for each engine."""
    names = [OURS, *(name for name in (*PEERS, BOUND) if any(name in row.rates for row in rows))]
    return table_lines(
        ["form", "work", *names, "ratio", "demanded"],
        (
            [row.form, row.label]
            + [f"{row.rates[name]:g}" if name in row.rates else "" for name in names]
            + [f"{row.ratio}" if row.best_peer else "", f"{row.demanded}"]
            for row in rows
        ),
    )


def peers_table() -> list[str]:
    """A line for each peer: what the forms are there, and what it runs with; then the servers among them."""
    engines = [
        [name, ", ".join(peer.forms.get(form, "none") for form in ("16-bit", "int8", "int4")), peer.flags]
        for name, peer in PEERS.items()
    ]
    served = [
        [f"{name}, served", PEERS[name].forms["16-bit"], SERVERS[name].flags] for name in SERVERS if name in PEERS
    ]
    return table_lines(["peer", "16-bit, int8, int4", "runs with"], [*engines, *served])


def readme_table(rows: Sequence[Row]) -> list[str]:
    """Ours and the best peer's, for one sequence."""
    wanted = [row for row in rows if row.label in README_WORKS and row.best_peer]
    return table_lines(
        ["tokens per second", OURS, "best peer", "ratio"],
        (
            [f"{row.form}, {row.label}", f"{row.rates[OURS]:g}", f"{row.best_peer}: {row.rates[row.best_peer or '']:g}"]
            + [f"{row.ratio}"]
            for row in wanted
        ),
    )


def write_documents(rows: Sequence[Row], not_measured: Sequence[str], about: Mapping[str, Any]) -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    head = f"{about['cores']} cores of {processor()}, {about['model']}, {today}, medians of {about['rounds']} rounds, "
    head += f"of {LONG_ROUNDS} at most where they take long."
    details = [head, "", *measured_table(rows), "", *peers_table()]
    details += ["", "Not measured:", "", *(f"- {line}" for line in not_measured)] if not_measured else []
    for name, lines in {"docs/performance.md": details, "README.md": [head, "", *readme_table(rows)]}.items():
        path = REPOSITORY / name
        path.write_text(with_part(path.read_text(), BEGIN, END, "\n".join(lines)))
