"""The rows of engines without HTTP: all sides of a form stay loaded and take turns."""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.offline import large_array, read_bandwidth
from benchmarks.peers import table
from benchmarks.peers.progress import Progress
from benchmarks.peers.results import Results
from benchmarks.peers.rounds import take_turns
from benchmarks.peers.table import OUR_FORMS, PEERS
from benchmarks.peers.works import (
    BOUND,
    FLOOR_SHARES,
    FLOOR_WORK,
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
NUM_TRIALS = 2
"""Rounds of the first work before those that count: they warm all sides up, and the last chooses a peer's setting."""
Key = tuple[str, str]
"""An engine's name and that of its setting."""
Turn = Callable[[], dict[str, Any]]
MEMORY: Key = (BOUND, "")
"""The turn that sums an array. It comes right before ours, as the bandwidth changes within seconds on some machines,
and takes or frees no memory, which would keep the kernel busy in our turn."""


def decode_rate(answer: Mapping[str, Any]) -> float:
    """Tokens per second."""
    return float(answer["num_decoded"] / answer["decode_s"])


def bandwidth_share(
    answers: Sequence[Mapping[str, Any]], readings: Sequence[Mapping[str, Any]], read_bytes: int
) -> float:
    """The median part of the memory's bandwidth that decoding had which reads so many bytes for a token."""
    pairs = zip(answers, readings, strict=True)
    return statistics.median(decode_rate(answer) * read_bytes / 1e9 / float(read["gb_per_s"]) for answer, read in pairs)


def median_rates(work: Work, answers: Mapping[Key, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Medians of tokens per second, kind -> name -> rate."""
    rates: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
    for (name, _), took in answers.items():
        prompts = [work.num_sequences * work.prompt_tokens / answer["prefill_s"] for answer in took]
        rates["prefill"][name] = round(statistics.median(prompts), 2)
        rates["decode"][name] = round(statistics.median(map(decode_rate, took)), 2)
    return rates


class Engines:
    """Ours and its peers with one model."""

    def __init__(self, folder: str, args: argparse.Namespace, results: Results, progress: Progress) -> None:
        self._folder, self._args, self._results, self._progress = folder, args, results, progress
        self._is_vnni = args.isa == "native" and has_integer_dot_product()

    @functools.cached_property
    def _array(self) -> Any:
        return large_array()

    def _read_memory(self) -> dict[str, Any]:
        """The turn `MEMORY`."""
        return {"gb_per_s": read_bandwidth(self._array)}

    def measure(self, form: str) -> None:
        """The rows of one form that are not there yet."""
        works = [work for work in WORKS if not self._results.has(form, work.labels)]
        if not works:
            return
        with contextlib.ExitStack() as stack:
            ours = table.pytgi_side(OUR_FORMS[form], self._folder, self._args.isa, table.KV_TOKENS)
            sides: dict[Key, Side] = {(OURS, ""): stack.enter_context(ours)}
            for name in self._args.peers:
                sides |= self._started(name, form, stack)
            self._choose_settings(form, sides)
            for work in works:
                is_first = work == WORKS[0]
                before: Mapping[Key, Turn] = {MEMORY: self._read_memory} if is_first else {}
                num_rounds = work.num_rounds(self._args.rounds)
                answers = self._play(form, work, sides, num_rounds, self._args.max_load, before)
                if is_first:
                    share = bandwidth_share(answers[OURS, ""], answers.pop(MEMORY), ours.about["read_bytes"])
                    self._results.add(Row(form, FLOOR_WORK, {OURS: round(share, 3), BOUND: 1.0}, FLOOR_SHARES[form]))
                rates = median_rates(work, answers)
                for kind in work.kinds:
                    row = Row(form, work.label(kind), rates[kind], demanded(form, work, kind, self._is_vnni))
                    self._results.add(row)
                self._progress.advance((form, work))

    def _started(self, name: str, form: str, stack: contextlib.ExitStack) -> dict[Key, Side]:
        """The sides of a peer, one for each of its settings."""
        peer = PEERS[name]
        if form not in peer.forms:
            self._results.tell(f"{name}: no {form}: {peer.lacks}")
            return {}
        if self._args.isa not in peer.builds:
            self._results.tell(f"{name}: can't be held to {self._args.isa}")
            return {}
        try:
            python = table.python_of(peer, self._args.isa)
            model = table.converted(peer, Path(self._folder), peer.forms[form], python)
            return {
                (name, setting): stack.enter_context(table.peer_side(peer, setting, model, python))
                for setting in peer.settings
            }
        except FAILURES as error:
            self._results.tell(f"{name}: {form} does not start: {error}")
            return {}

    def _play(
        self,
        form: str,
        work: Work,
        sides: dict[Key, Side],
        num_rounds: int,
        max_load: float,
        before: Mapping[Key, Turn],
    ) -> dict[Key, list[dict[str, Any]]]:
        """The answers of each side, and of what has its turns `before` them; a side that fails leaves `sides`."""
        message = {
            "prompt_ids": text_ids(self._folder)[: work.prompt_tokens],
            "num_tokens": work.num_new,
            "num_sequences": work.num_sequences,
        }
        turns: dict[Key, Turn] = {
            **before,
            **{key: functools.partial(side.ask, **message) for key, side in sides.items()},
        }
        answers, failures = take_turns(turns, num_rounds, max_load)
        for key, reason in failures.items():
            del sides[key]
            self._results.tell(f"{key[0]}: {form}, {work.label('decode')} failed: {reason}")
        return answers

    def _choose_settings(self, form: str, sides: dict[Key, Side]) -> None:
        """Warm up, and leave the quicker setting of each peer."""
        answers = self._play(form, WORKS[0], sides, NUM_TRIALS, float("inf"), {})
        seconds = {key: took[-1]["prefill_s"] + took[-1]["decode_s"] for key, took in answers.items()}
        for name in {name for name, _ in sides}:
            *slower, best = sorted((key for key in sides if key[0] == name), key=seconds.__getitem__, reverse=True)
            for key in slower:
                sides.pop(key).stop()
            if best[1]:
                print(f"{name}: {form} runs with {best[1]}", flush=True)
