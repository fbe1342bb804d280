"""Servers in turns, in 16 bits: many streams at a time, a chat of several turns, a prompt that begins as one before.

The load is that of `text-generation-benchmark`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.peers.engines import FAILURES
from benchmarks.peers.progress import Progress
from benchmarks.peers.results import Results
from benchmarks.peers.rounds import take_turns
from benchmarks.peers.servers import NUM_STREAMS, SERVERS, started
from benchmarks.peers.works import BOUND, LONG_ROUNDS, OURS, Row
from server.bench.answers import read_answer
from server.bench.connection import Address, Exchange
from server.bench.load import Target, run_closed
from server.bench.records import Record, record_of
from server.bench.statistics import summarize
from server.bench.tokenizer import open_tokenizer
from server.bench.trace import Lengths, Plan, Shape, Tokenize, make_prompt, make_trace
from server.bench.wires import WIRES, Body, Options, Wire

TIMEOUT_S = 600.0
NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 24, 256, 128
NUM_TURNS, TURN_TOKENS, TURN_NEW_TOKENS = 8, 200, 32
PREFIX_TOKENS, OWN_TOKENS = 2000, 16

Figures = Mapping[str, float]
Turn = Callable[[str, str, Tokenize], Figures]
"""Asks the server of an address, with the prompts of a seed."""


def exchanges_with(url: str, wire: Wire, plans: Sequence[Plan], num_streams: int) -> list[Exchange]:
    target = Target(Address.parse(url), wire, Options("demo", ignores_eos=True, sampling={}, served="demo"), TIMEOUT_S)
    exchanges: list[Exchange] = []
    asyncio.run(run_closed(target, plans, num_streams, exchanges.append))
    return exchanges


def whole_record(exchange: Exchange, wire: Wire, num_new: int) -> Record:
    """Raises ValueError unless the answer has as many tokens as it should."""
    record = record_of(exchange, wire)
    if record.failure is not None:
        raise ValueError(record.failure)
    if record.num_output_tokens != num_new:
        raise ValueError(f"{record.num_output_tokens} tokens came, {num_new} were asked for")
    return record


def many_streams(url: str, seed: str, tokenize: Tokenize) -> Figures:
    shape = Shape(Lengths.parse(str(PROMPT_TOKENS)), Lengths.parse(str(NEW_TOKENS)))
    wire = WIRES["completions"]
    exchanges = exchanges_with(url, wire, make_trace(shape, NUM_REQUESTS, None, seed, tokenize), NUM_STREAMS)
    records = [whole_record(exchange, wire, NEW_TOKENS) for exchange in exchanges]
    summary = summarize([records], {}, 0)
    return {
        "tokens/s": summary.output_tokens_per_s,
        "first token, p50, s": summary.latencies["ttft"][50].value,
        "between tokens, p99, s": summary.latencies["inter_token"][99].value,
        "between tokens, longest, s": max(gap for record in records for gap in record.gaps_s),
    }


def _messages_body(plan: Plan, options: Options) -> Body:
    """A chat of several messages, which the plan has as JSON."""
    return {**WIRES["chat"].body(plan, options), "messages": json.loads(plan.prompt)}


MESSAGES = dataclasses.replace(WIRES["chat"], body=_messages_body)


def text_of(exchange: Exchange) -> str:
    events = [event for _, event in read_answer(exchange.reads).events()]
    deltas = [choice["delta"].get("content") for event in events for choice in event.get("choices") or ()]
    return "".join(filter(None, deltas))


def chat(url: str, seed: str, tokenize: Tokenize) -> Figures:
    """A chat whose every turn has all turns before it in its prompt."""
    rng, messages = random.Random(seed), []
    for _ in range(NUM_TURNS):
        messages.append({"role": "user", "content": make_prompt(TURN_TOKENS, rng, tokenize)})
        (exchange,) = exchanges_with(url, MESSAGES, [Plan(0.0, json.dumps(messages), TURN_NEW_TOKENS)], 1)
        record = whole_record(exchange, MESSAGES, TURN_NEW_TOKENS)
        messages.append({"role": "assistant", "content": text_of(exchange)})
    return {"first token, s": record.time_to_first_token_s}


def same_prefix(url: str, seed: str, tokenize: Tokenize) -> Figures:
    """Two prompts that begin alike, one after the other."""
    rng, wire = random.Random(seed), WIRES["completions"]
    prefix = make_prompt(PREFIX_TOKENS, rng, tokenize)
    plans = [Plan(0.0, f"{prefix} {make_prompt(OWN_TOKENS, rng, None)}", 1) for _ in range(2)]
    cold, warm = (whole_record(exchange, wire, 1) for exchange in exchanges_with(url, wire, plans, 1))
    return {BOUND: cold.time_to_first_token_s, "first token, s": warm.time_to_first_token_s}


@dataclasses.dataclass(frozen=True)
class ServedWork:
    """What servers are asked in turns; each of its figures is a row."""

    label: str
    turn: Turn
    demanded: Mapping[str, float]
    """Figure -> the ratio that passes; all but tokens per second are times."""
    turn_s: float
    """Seconds that a turn should take on two cores."""
    servers: Sequence[str] = tuple(SERVERS)

    @property
    def labels(self) -> dict[str, str]:
        """Figure -> label of its row."""
        return {figure: f"{self.label}: {figure}" for figure in self.demanded}


SERVED_WORKS = (
    ServedWork(
        f"HTTP, {NUM_STREAMS} streams",
        many_streams,
        {
            "tokens/s": 1.4,
            "first token, p50, s": 0.5,
            "between tokens, p99, s": 1.0,
            "between tokens, longest, s": 1.0,
        },
        27.0,
    ),
    ServedWork(f"last of {NUM_TURNS} turns of a chat", chat, {"first token, s": 1.0}, 17.0),
    ServedWork(f"{PREFIX_TOKENS:,} tokens as before", same_prefix, {"first token, s": 0.08}, 7.0, [OURS]),
)


class Served:
    """Our server and its peers with one model."""

    def __init__(self, folder: str, args: argparse.Namespace, results: Results, progress: Progress) -> None:
        self._folder, self._args, self._results, self._progress = folder, args, results, progress
        self._tokenize = open_tokenizer(folder, None)

    def measure(self) -> None:
        """The rows that are not there yet."""
        works = [work for work in SERVED_WORKS if not self._results.has("16-bit", work.labels.values())]
        if not works:
            return
        with contextlib.ExitStack() as stack:
            urls: dict[str, str] = {}
            for name in SERVERS:
                if name != OURS and name not in self._args.peers:
                    continue
                try:
                    urls[name] = stack.enter_context(started(name, self._folder))
                except FAILURES as error:
                    self._results.tell(f"{name}: does not serve: {error}")
            for work in works:
                self._measure_work(work, urls)
                self._progress.advance(("served", work.label))

    def _measure_work(self, work: ServedWork, urls: Mapping[str, str]) -> None:
        def turn(url: str, numbers: Iterator[int]) -> Figures:
            return work.turn(url, f"{work.label} {next(numbers)}", self._tokenize)

        turns = {
            name: functools.partial(turn, url, itertools.count()) for name, url in urls.items() if name in work.servers
        }
        taken, failures = take_turns(turns, min(self._args.rounds, LONG_ROUNDS), self._args.max_load)
        for name, reason in failures.items():
            self._results.tell(f"{name}: {work.label} failed: {reason}")
        for row in self._rows(work, taken) if OURS in taken else ():
            self._results.add(row)

    def _rows(self, work: ServedWork, taken: Mapping[str, Sequence[Figures]]) -> Iterator[Row]:
        for figure, ratio in work.demanded.items():
            rates: dict[str, Any] = {name: statistics.median(f[figure] for f in got) for name, got in taken.items()}
            if BOUND in taken[OURS][0]:
                rates[BOUND] = statistics.median(figures[BOUND] for figures in taken[OURS])
            rounded = {name: round(rate, 3) for name, rate in rates.items()}
            yield Row("16-bit", work.labels[figure], rounded, ratio, is_time=figure != "tokens/s")
