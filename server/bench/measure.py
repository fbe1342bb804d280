"""Servers under one load after another, in turns where there are two; what was measured survives Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server.bench.connection import Address, Exchange
from server.bench.discovery import find_model, find_tgi_model
from server.bench.errors import BenchmarkError
from server.bench.load import Target, run_closed, run_open
from server.bench.machine import machine, now
from server.bench.options import BATCH_SIZES, sampling_of
from server.bench.progress import Progress
from server.bench.records import record_of
from server.bench.reports import Report
from server.bench.results import Level, build_report
from server.bench.tokenizer import open_tokenizer
from server.bench.trace import Plan, Shape, Tokenize, make_trace
from server.bench.wires import WIRES, Options

NUM_REQUESTS_AT_A_RATE = 100


@dataclass(frozen=True)
class Load:
    """So many requests at a time, or, with `rate`, so many a second."""

    num_streams: int
    rate: float | None
    num_requests: int

    @property
    def name(self) -> str:
        return f"{self.num_streams} at a time" if self.rate is None else f"{self.rate:g} per second"


@dataclass
class Measured:
    """What came back under a load so far."""

    load: Load
    exchanges: dict[str, list[list[Exchange]]] = field(default_factory=dict)


def loads_of(args: argparse.Namespace) -> list[Load]:
    if args.request_rate:
        return [Load(1, rate, args.num_requests or NUM_REQUESTS_AT_A_RATE) for rate in args.request_rate]
    sizes = args.batch_size or BATCH_SIZES
    return [Load(size, None, args.num_requests or size * args.runs) for size in sizes]


def measure_servers(args: argparse.Namespace) -> tuple[Report, bool]:
    """The report, and whether it is whole. Raises BenchmarkError."""
    tokenize = None if args.tokenizer_name is None else open_tokenizer(args.tokenizer_name, args.revision)
    targets: dict[str, Target] = {}
    measured: list[Measured] = []
    progress = Progress()
    is_whole = True
    try:
        asyncio.run(_measure(args, targets, tokenize, measured, progress))
    except KeyboardInterrupt:
        is_whole = False
    progress.end()
    levels = [
        Level(
            part.load.name,
            {
                server: [[record_of(exchange, targets[server].wire) for exchange in round_] for round_ in rounds]
                for server, rounds in part.exchanges.items()
            },
        )
        for part in measured
    ]
    return build_report(_parameters(args, targets), levels, dict(args.slo), args.seed), is_whole


async def _measure(
    args: argparse.Namespace,
    targets: dict[str, Target],
    tokenize: Tokenize | None,
    measured: list[Measured],
    progress: Progress,
) -> None:
    for url in [args.url, *([args.compare] if args.compare else [])]:
        name = url if url not in targets else f"{url} again"
        targets[name] = await _target(url, args)
    num_rounds = args.rounds if args.compare else 1
    shape = Shape(args.sequence_length, args.decode_length, args.shared_prefix)
    for load in loads_of(args):
        part = Measured(load, {name: [] for name in targets})
        measured.append(part)
        await _warm_up(args, load, shape, tokenize, targets, progress)
        for number in range(num_rounds):
            plans = make_trace(shape, load.num_requests, load.rate, f"{args.seed} {load.name} {number}", tokenize)
            # Whoever is first in a round is second in the next.
            for name, target in list(targets.items())[:: -1 if number % 2 else 1]:
                part.exchanges[name].append([])
                text = f"{name}: {load.name}" + (f", round {number + 1} of {num_rounds}" if args.compare else "")
                await _send(target, plans, load, part.exchanges[name][-1], progress, text)


async def _warm_up(
    args: argparse.Namespace,
    load: Load,
    shape: Shape,
    tokenize: Tokenize | None,
    targets: dict[str, Target],
    progress: Progress,
) -> None:
    """Send other prompts than those that count. Raises BenchmarkError if a server answers none of them."""
    plans = make_trace(shape, args.warmups * load.num_streams, None, f"{args.seed} warm-up {load.name}", tokenize)
    for name, target in targets.items():
        exchanges: list[Exchange] = []
        await _send(target, plans, Load(load.num_streams, None, len(plans)), exchanges, progress, f"{name}: warm-up")
        failures = [failure for each in exchanges if (failure := record_of(each, target.wire).failure) is not None]
        if exchanges and len(failures) == len(exchanges):
            raise BenchmarkError(f"{name} answers no request at {target.wire.route}: {failures[0]}")


async def _send(
    target: Target, plans: Sequence[Plan], load: Load, exchanges: list[Exchange], progress: Progress, text: str
) -> None:
    def on_exchange(exchange: Exchange) -> None:
        exchanges.append(exchange)
        progress.advance()

    progress.begin(text, len(plans))
    if load.rate is None:
        await run_closed(target, plans, load.num_streams, on_exchange)
    else:
        await run_open(target, plans, on_exchange)


async def _target(url: str, args: argparse.Namespace) -> Target:
    address = Address.parse(url, args.api_key)
    tgi_model = await find_tgi_model(address, args.timeout) if args.wire in (None, "tgi") else None
    wire = WIRES[args.wire or ("completions" if tgi_model is None else "tgi")]
    sampling = sampling_of(args)
    if unknown := sampling.keys() - wire.sampling:
        raise BenchmarkError(f"{url} has no {min(unknown)} at {wire.route}")
    if wire.names_adapters_only:
        model = "" if args.model in (None, tgi_model) else args.model
        served = f"{tgi_model or 'not said'}, adapter {model}" if model else tgi_model or "not said"
    else:
        model = served = args.model or await find_model(address, args.timeout)
    return Target(address, wire, Options(model, not args.stop_at_eos, sampling, served), args.timeout)


def _parameters(args: argparse.Namespace, targets: dict[str, Target]) -> dict[str, Any]:
    return {
        **{f"route of {name}": target.wire.route for name, target in targets.items()},
        **{f"model of {name}": target.options.served for name, target in targets.items()},
        "date": now(),
        "machine that asked": machine(),
        "prompt tokens": str(args.sequence_length) if args.tokenizer_name else f"{args.sequence_length} (in words)",
        "output tokens": str(args.decode_length) + (", or to the end of the text" if args.stop_at_eos else ""),
        "shared prefix": args.shared_prefix,
        "warm-up runs": args.warmups,
        "sampling": ", ".join(f"{name}={value}" for name, value in sampling_of(args).items()) or "greedy",
        "objectives in ms": ", ".join(f"{name}:{limit * 1000:g}" for name, limit in args.slo) or "none",
        "seed": args.seed,
    }
