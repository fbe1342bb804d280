"""The command line: measures, prints, judges. The last line of standard output is JSON.

Exit code 1 when a ratio is below what we demand. A peer that can't be installed, or can't do a row, is told and not
counted. Environments are made once: llama.cpp and its server take a C++ compiler and ten minutes each. `--isa avx2`
holds both sides to AVX2, where a peer can be held to it. Rows are kept as they come: `--continue` measures only those
that an interrupted run has not got. Needs `make install`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from benchmarks.offline import demo_model, num_cores
from benchmarks.peers.engines import Engines
from benchmarks.peers.plan import planned_parts
from benchmarks.peers.progress import Progress
from benchmarks.peers.report import write_documents
from benchmarks.peers.results import OtherRunError, Results
from benchmarks.peers.rounds import TooLoadedError
from benchmarks.peers.served import Served
from benchmarks.peers.steady import measure_steadiness
from benchmarks.peers.table import OUR_FORMS, OUR_ISA, PEERS
from engine.link.environment import user_cache_dir

GROUPS = [*OUR_FORMS, "served", "steady"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", choices=list(OUR_ISA), default="native")
    parser.add_argument("--rows", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5, help="of each work (default: 5); three of what takes long")
    parser.add_argument(
        "--max-load", type=float, default=1.0, help="processors that others may use during a round (default: 1)"
    )
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md and README.md")
    parser.add_argument(
        "--continue",
        dest="is_continued",
        action="store_true",
        help="keep the rows of the last run, which was like this",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # no server outlives a stopped run
    folder = demo_model()
    about = {"model": Path(folder).name, "isa": args.isa, "cores": num_cores(), "rounds": args.rounds}
    path = user_cache_dir(dict(os.environ)) / "peers" / "results.json"
    try:
        results = Results(path, about, is_continued=args.is_continued)
        measure(folder, args, results)
    except OtherRunError as error:
        sys.exit(f"{error}: start without --continue")
    except TooLoadedError as error:
        sys.exit(f"{error}; rows so far are in {path}, and --continue goes on with them")
    if args.write:
        write_documents(results.rows, results.not_measured, about)
    print(json.dumps(results.as_json()))
    sys.exit(not results.has_passed)


def measure(folder: str, args: argparse.Namespace, results: Results) -> None:
    progress = Progress(planned_parts(args, results))
    for group in args.rows:
        if group == "served":
            Served(folder, args, results, progress).measure()
        elif group == "steady":
            measure_steadiness(folder, args, results, progress)
        else:
            Engines(folder, args, results, progress).measure(group)


if __name__ == "__main__":
    main()
