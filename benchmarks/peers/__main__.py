"""The command line: measures, prints, judges. The last line of standard output is JSON.

Exit code 1 when a ratio is below what we demand. A peer that can't be installed, or can't do a row, is told and not
counted. Environments are made once: llama.cpp takes a C++ compiler and ten minutes. `--isa avx2` holds both sides to
AVX2, where a peer can be held to it. Needs `make install`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.offline import demo_model, num_cores, read_bandwidth
from benchmarks.peers import table
from benchmarks.peers.report import print_row, write_documents
from benchmarks.peers.rounds import take_turns
from benchmarks.peers.served import SERVERS, served_rows, started
from benchmarks.peers.table import OUR_FORMS, OUR_ISA, PEERS
from benchmarks.peers.works import (
    FLOOR,
    FLOOR_SHARES,
    FLOOR_WORK,
    NEW_TOKENS,
    OURS,
    WORKS,
    Row,
    Work,
    demanded,
    has_integer_dot_product,
)
from benchmarks.perplexity import text_ids
from benchmarks.sides import Side

FAILURES = (RuntimeError, OSError, ValueError, subprocess.CalledProcessError)


class Comparison:
    """All peers against ours with one model; `not_measured` says what could not be, and why."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        self._folder, self._args = folder, args
        self._is_vnni = args.isa == "native" and has_integer_dot_product()
        self.not_measured: list[str] = []
        self.rows: list[Row] = []
        self._pythons: dict[str, str] = {}
        for name in args.peers:
            if args.isa not in PEERS[name].builds:
                self._tell(f"{name}: can't be held to {args.isa}")
                continue
            try:
                self._pythons[name] = table.python_of(PEERS[name], args.isa)
            except FAILURES as error:
                self._tell(f"{name}: not installed: {error}")

    def _tell(self, line: str) -> None:
        self.not_measured.append(line)
        print(line, flush=True)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print_row(row)

    def measure(self, form: str) -> None:
        """The rows of one form."""
        bandwidth = read_bandwidth()
        with contextlib.ExitStack() as stack:
            ours = table.pytgi_side(OUR_FORMS[form], self._folder, self._args.isa, table.KV_TOKENS)
            sides = {(OURS, ""): stack.enter_context(ours)}
            for name in self._pythons:
                sides |= self._started(name, form, stack)
            for work in WORKS:
                rates = self._turns(form, work, sides)
                for kind in work.kinds:
                    self._add(Row(form, work.label(kind), rates[kind], demanded(form, work, kind, self._is_vnni)))
                if work == WORKS[0]:
                    bandwidth = max(bandwidth, read_bandwidth())
                    share = rates["decode"][OURS] * ours.about["read_bytes"] / 1e9 / bandwidth
                    self._add(Row(form, FLOOR_WORK, {OURS: round(share, 3), FLOOR: 1.0}, FLOOR_SHARES[form]))

    def measure_served(self) -> None:
        """The rows over HTTP, in 16 bits."""
        pythons = {OURS: sys.executable, **self._pythons}
        with contextlib.ExitStack() as stack:
            urls = {}
            for name in (name for name in SERVERS if name in pythons):
                try:
                    urls[name] = stack.enter_context(started(name, pythons[name], self._folder))
                except FAILURES as error:
                    self._tell(f"{name}: does not serve: {error}")
            rows, failures = served_rows(urls, text_ids(self._folder), self._folder, self._args)
        for name, reason in failures.items():
            self._tell(f"{name}: served row failed: {reason}")
        for row in rows:
            self._add(row)

    def _started(self, name: str, form: str, stack: contextlib.ExitStack) -> dict[tuple[str, str], Side]:
        """The sides of a peer, one for each of its settings."""
        peer = PEERS[name]
        if form not in peer.forms:
            self._tell(f"{name}: no {form}: {peer.lacks}")
            return {}
        try:
            model = table.converted(peer, Path(self._folder), peer.forms[form], self._pythons[name])
            return {
                (name, setting): stack.enter_context(table.peer_side(peer, setting, model, self._pythons[name]))
                for setting in peer.settings
            }
        except FAILURES as error:
            self._tell(f"{name}: {form} does not start: {error}")
            return {}

    def _turns(self, form: str, work: Work, sides: dict[tuple[str, str], Side]) -> dict[str, dict[str, float]]:
        """Medians of tokens per second, kind -> name -> rate; a peer has that of its better setting."""
        message = {
            "prompt_ids": text_ids(self._folder)[: work.prompt_tokens],
            "num_tokens": NEW_TOKENS,
            "num_sequences": work.num_sequences,
        }
        turns = {key: functools.partial(side.ask, **message) for key, side in sides.items()}
        answers, failures = take_turns(turns, self._args.rounds, self._args.max_load)
        for side, reason in failures.items():
            del sides[side]
            self._tell(f"{side[0]}: {form}, {work.label('decode')} failed: {reason}")
        rates: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
        for (name, _), took in answers.items():
            medians = {
                "prefill": statistics.median(work.num_sequences * work.prompt_tokens / a["prefill_s"] for a in took),
                "decode": statistics.median(a["num_decoded"] / a["decode_s"] for a in took),
            }
            for kind, rate in medians.items():
                rates[kind][name] = max(rates[kind].get(name, 0.0), round(rate, 2))
        return rates


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", choices=list(OUR_ISA), default="native")
    parser.add_argument("--rows", nargs="+", choices=[*OUR_FORMS, "served"], default=[*OUR_FORMS, "served"])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--max-load", type=float, default=1.0, help="processors that others may use during a round (default: 1)"
    )
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md and README.md")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    folder = demo_model()
    comparison = Comparison(folder, args)
    for form in args.rows:
        if form == "served":
            comparison.measure_served()
        else:
            comparison.measure(form)
    about = {"model": Path(folder).name, "isa": args.isa, "cores": num_cores(), "rounds": args.rounds}
    if args.write:
        write_documents(comparison.rows, comparison.not_measured, about)
    print(json.dumps({**about, **as_json(comparison)}))
    sys.exit(not all(row.has_passed for row in comparison.rows))


def as_json(comparison: Comparison) -> Mapping[str, Any]:
    rows = [
        {"form": row.form, "work": row.label, **row.rates, "best": row.best_peer, "ratio": row.ratio}
        | {"demanded": row.demanded, "passed": row.has_passed}
        for row in comparison.rows
    ]
    return {"rows": rows, "not_measured": comparison.not_measured, "passed": all(row["passed"] for row in rows)}


if __name__ == "__main__":
    main()
