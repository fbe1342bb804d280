"""How steadily streams get their tokens while a long prompt is computed: the load of `benchmarks/steadiness.py`."""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Iterator

from benchmarks.peers.progress import Progress
from benchmarks.peers.results import Results
from benchmarks.peers.rounds import take_turns
from benchmarks.peers.table import OUR_FORMS
from benchmarks.peers.works import BOUND, LONG_ROUNDS, OURS, Row
from benchmarks.sides import Side
from benchmarks.steadiness import LOADS, REPOSITORY, figures, steady_side

FORMS = ("16-bit", "int8")
LABEL = f"4 streams while {LOADS['intrude']:,} tokens arrive: between tokens, p99, s"
MAX_GAP_S = 0.35
"""The longest gap that passes, whatever the machine."""


def measure_steadiness(folder: str, args: argparse.Namespace, results: Results, progress: Progress) -> None:
    """The rows that are not there yet."""
    for form in FORMS:
        if results.has(form, [LABEL]):
            continue
        with steady_side(REPOSITORY, OUR_FORMS[form], folder) as side:
            turn = functools.partial(_gap_s, side, itertools.count())
            gaps_s, _ = take_turns({OURS: turn}, min(args.rounds, LONG_ROUNDS), args.max_load)
        rates = {OURS: round(statistics.median(gaps_s[OURS]), 3), BOUND: MAX_GAP_S}
        results.add(Row(form, LABEL, rates, 1.0, is_time=True))
        progress.advance(("steady", form))


def _gap_s(side: Side, seeds: Iterator[int]) -> float:
    """The 99th percentile in one round, whose prompts are others than those before."""
    return figures(side.ask(load="intrude", seed=next(seeds), size=LOADS["intrude"]))["gap_p99"]
