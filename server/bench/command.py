"""`text-generation-benchmark`: flags in, tables and files out."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.bench.engine_alone import measure_engine
from server.bench.errors import BenchmarkError
from server.bench.measure import measure_servers
from server.bench.options import PROGRAM, build_parser, complaint_of
from server.bench.reports import Report, as_markdown, write_report

SEED_BITS = 31
INTERRUPTED_EXIT_CODE = 130


def main(arguments: Sequence[str], shown_as: str = PROGRAM, environ: Mapping[str, str] = os.environ) -> int:
    """The exit code: 0, 1 if nothing could be measured, 130 after Ctrl-C, when what was measured is printed."""
    parser = build_parser(environ, shown_as)
    args = parser.parse_args(arguments)
    flags = [argument.partition("=")[0] for argument in arguments]
    if (complaint := complaint_of(args, flags)) is not None:
        parser.error(complaint)
    if args.seed is None:
        args.seed = random.SystemRandom().getrandbits(SEED_BITS)
    try:
        report, is_whole = _measure(args)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return _publish(report, args.output, is_whole)


def _measure(args: argparse.Namespace) -> tuple[Report, bool]:
    return measure_engine(args) if args.url is None else measure_servers(args)


def _publish(report: Report, paths: Sequence[Path], is_whole: bool) -> int:
    print(as_markdown(report), end="")
    try:
        for path in paths:
            write_report(report, path)
            print(f"written: {path}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if is_whole else INTERRUPTED_EXIT_CODE
