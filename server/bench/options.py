"""The flags of `text-generation-benchmark`: TGI's, and those of the load on a server."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.link.suggestions import SuggestingParser
from server.bench.connection import Address
from server.bench.reports import WRITERS
from server.bench.statistics import METRICS
from server.bench.trace import FORMS, Lengths
from server.bench.wires import WIRES

PROGRAM = "text-generation-benchmark"
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SAMPLING: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "typical_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "top_n_tokens": int,
}
"""TGI's sampling parameters that have a value -> its type."""

DESCRIPTION = """\
Measure text generation. With --url: a running server with TGI's or OpenAI's routes, under load from a seeded trace.
Without: an engine that is loaded for it from --tokenizer-name, step by step, as TGI's tool of this name does with its
shards.
"""
EXAMPLES = """\
Examples:
  text-generation-benchmark --url http://localhost:8080
      TGI's batch sizes as so many requests at a time, one after the other; tables on standard output
  text-generation-benchmark --url http://localhost:8080 -b 16 -s lognormal:512:0.6 -d uniform:64:256 -r 4 \\
      --output report.html --output report.json
      16 streams, 64 requests, lengths as users have them; a page with plots, and all numbers
  text-generation-benchmark --url http://localhost:8080 --request-rate 2 --num-requests 200 -s 512 -d 128 \\
      --slo ttft:500 --slo inter_token:100
      requests that arrive at random, 2 a second; goodput: those that begin within 500 ms and never pause for 100
  text-generation-benchmark --url http://localhost:8080 --compare http://localhost:8000 -b 8 -s 256 -d 128
      both servers in turns, and their ratios
  text-generation-benchmark --tokenizer-name Qwen/Qwen2.5-0.5B-Instruct -b 1 -b 8 -s 512 -d 64
      no server: the engine alone
"""


def build_parser(environ: Mapping[str, str], shown_as: str = PROGRAM) -> argparse.ArgumentParser:
    """`shown_as` is the command that the user typed."""
    parser = SuggestingParser(
        prog=shown_as,
        description=DESCRIPTION,
        epilog=EXAMPLES.replace(PROGRAM, shown_as),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_work(parser, environ)
    _add_server(parser)
    _add_sampling(parser, environ)
    return parser


def _add_work(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    group = parser.add_argument_group("the work (TGI's flags; their variables are named like TOKENIZER_NAME)")
    add = group.add_argument
    name = "model folder or id on the Hub; with --url only its tokenizer is read, and prompts have the exact length"
    add("-t", "--tokenizer-name", default=environ.get("TOKENIZER_NAME"), help=name)
    add("--revision", default=environ.get("REVISION"), help="of the model on the Hub")
    sizes = "sequences at a time; may be repeated (default: 1 2 4 8 16 32)"
    add("-b", "--batch-size", type=positive, action="append", help=sizes)
    lengths = f"tokens of a prompt: a number, or with --url a distribution ({FORMS}); default 10"
    add("-s", "--sequence-length", type=lengths_of, default=environ.get("SEQUENCE_LENGTH", "10"), help=lengths)
    lengths = "tokens of an output, in the same forms; default 8"
    add("-d", "--decode-length", type=lengths_of, default=environ.get("DECODE_LENGTH", "8"), help=lengths)
    add("-r", "--runs", type=positive, default=environ.get("RUNS", "10"), help="runs of each batch size (default 10)")
    runs = "runs of each batch size before, which don't count (default 1)"
    add("-w", "--warmups", type=not_negative, default=environ.get("WARMUPS", "1"), help=runs)
    socket = "refused: there are no shards behind a socket here; --url names a server that runs"
    add("-m", "--master-shard-uds-path", default=environ.get("MASTER_SHARD_UDS_PATH"), help=socket)
    add("--seed", type=int, help="of prompts, lengths and arrivals (default: another one each time, which is reported)")
    files = "file for the report, .json, .md or .html; may be repeated"
    add("-o", "--output", type=output_path, action="append", default=[], help=files)


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load on a server")
    group.add_argument("--url", help="address of the server")
    for flag, options in server_flags().items():
        group.add_argument(flag, **options)


def server_flags() -> dict[str, dict[str, Any]]:
    """The flags that mean nothing without --url -> what argparse is told of them."""
    wire = "routes to call (default: tgi if the server has TGI's /info, completions otherwise)"
    model = "model to name on OpenAI's routes (default: the first of /v1/models); on TGI's an adapter, as adapter_id"
    rate = "requests per second, arriving at random however many are under way; may be repeated; replaces --batch-size"
    count = "requests of each load (default: runs times batch size; 100 for a rate)"
    slo = f"METRIC:MS, one of {', '.join(METRICS)}: what a request must keep for the goodput; may be repeated"
    timeout = "seconds without a byte after which a request has failed (120)"
    eos = "let outputs end by themselves, and send no ignore_eos, min_tokens"
    compare = "address of a second server, which takes turns with the first"
    return {
        "--compare": {"metavar": "URL", "help": compare},
        "--rounds": {"type": positive, "default": 5, "help": "turns of each server with --compare (default 5)"},
        "--wire": {"choices": sorted(WIRES), "help": wire},
        "--model": {"help": model},
        "--api-key": {"help": "sent as a bearer token"},
        "--request-rate": {"type": positive_number, "action": "append", "help": rate},
        "--num-requests": {"type": positive, "help": count},
        "--shared-prefix": {
            "type": not_negative,
            "default": 0,
            "metavar": "TOKENS",
            "help": "that all prompts begin with",
        },
        "--slo": {"type": objective_of, "action": "append", "default": [], "help": slo},
        "--timeout": {"type": positive_number, "default": 120.0, "help": timeout},
        "--stop-at-eos": {"action": "store_true", "help": eos},
    }


def _add_sampling(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    add = parser.add_argument_group("sampling (TGI's flags; greedy without them)").add_argument
    for name, type_ in SAMPLING.items():
        add(f"--{name.replace('_', '-')}", type=type_, default=environ.get(name.upper()))
    for name in ("watermark", "do_sample"):
        is_set = environ.get(name.upper(), "").lower() in ("1", "true")
        add(f"--{name.replace('_', '-')}", action="store_true", default=is_set)


def sampling_of(args: argparse.Namespace) -> dict[str, float | int | bool]:
    """The sampling parameters that were given, by TGI's names."""
    names = [*SAMPLING, "watermark", "do_sample"]
    return {name: value for name in names if (value := getattr(args, name)) not in (None, False)}


def complaint_of(args: argparse.Namespace, flags: Sequence[str]) -> str | None:
    """Why the flags don't go together, with the next step; None if they do. `flags` are those of the command line."""
    if args.master_shard_uds_path is not None:
        return (
            "--master-shard-uds-path: shards have no socket for others here. Name a running server with --url, or "
            "leave the flag out: the engine is then loaded from --tokenizer-name"
        )
    if args.url is None:
        if needing := [flag for flag in flags if flag in server_flags()]:
            return f"{needing[0]} is for a server: name it with --url"
        if args.tokenizer_name is None:
            return "name a running server with --url, or a model to load with --tokenizer-name"
        if None in (args.sequence_length.length, args.decode_length.length):
            return "without --url --sequence-length and --decode-length are numbers"
    try:
        for url in filter(None, (args.url, args.compare)):
            Address.parse(url)
    except ValueError as error:
        return str(error)
    if "--rounds" in flags and args.compare is None:
        return "--rounds is for two servers in turns: name the second with --compare"
    if args.batch_size and args.request_rate:
        return "--batch-size and --request-rate exclude each other: so many requests at a time, or so many a second"
    if args.wire and (unknown := sampling_of(args).keys() - WIRES[args.wire].sampling):
        return f"--{min(unknown).replace('_', '-')} does not exist on OpenAI's routes: use --wire tgi"
    return None


def positive(text: str) -> int:
    return _whole(text, 1)


def not_negative(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, minimum: int) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {minimum} on")
    return int(text)


def positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def lengths_of(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def objective_of(text: str) -> tuple[str, float]:
    """Key of METRICS, and seconds."""
    name, _, limit = text.partition(":")
    if name not in METRICS:
        raise argparse.ArgumentTypeError(f"{text} is not METRIC:MS with one of {', '.join(METRICS)}")
    return name, positive_number(limit) / 1000


def output_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in WRITERS:
        raise argparse.ArgumentTypeError(f"{text} ends in none of {', '.join(WRITERS)}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path
