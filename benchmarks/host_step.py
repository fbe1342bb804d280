"""The host's milliseconds in a step, with no weights and no GPU: all that is neither forward nor sampling kernel.

    python benchmarks/host_step.py [--old CHECKOUT] [--sequences 1 8 32 128] [--contexts 1024 4096 32768] [--rounds 5]
        [--overlap]

Sequences of a context decode with a model that computes nothing. The processor's time is counted, which other
processes disturb little. With --old, rounds of another checkout of this repository are interleaved with this one's,
and the median of the rounds' ratios is shown. With --overlap this checkout's steps overlap, as on a GPU, and the other
one's do not; without --old that is this checkout once more. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.offline import num_cores, restart_in_venv  # noqa: E402
from benchmarks.sides import Side  # noqa: E402
from engine.link.environment import engine_environment  # noqa: E402

PARTS = "schedule inputs buffers sampling update publish step".split()
NUM_STEPS = 96
"""Steps of a round: every sequence begins six blocks of 16 tokens."""

Rounds = dict[str, list[float]]


def host_side(checkout: Path) -> Side:
    environ = {**os.environ, "PYTHONPATH": str(checkout)}
    environ |= engine_environment(num_cores(), environ)
    return Side(sys.executable, "side_host_step.py", [], environ)


def measure(
    sides: Mapping[str, Side], num_sequences: int, context: int, rounds: int, *, is_overlapped: bool
) -> dict[str, Rounds]:
    """Milliseconds of each part, round by round, for each side; steps of the new one overlap if `is_overlapped`."""
    measured: dict[str, Rounds] = {name: {part: [] for part in PARTS} for name in sides}
    for index in range(rounds):
        for name in sorted(sides, reverse=bool(index % 2)):
            answer = sides[name].ask(
                num_sequences=num_sequences,
                context=context,
                num_steps=NUM_STEPS,
                is_overlapped=is_overlapped and name == "new",
            )
            for part in PARTS:
                measured[name][part].append(answer[part])
    return measured


def row(num_sequences: int, context: int, measured: dict[str, Rounds]) -> dict[str, float | int | str]:
    """Medians of the parts by side, and of the ratio of whole steps."""
    values: dict[str, float | int | str] = {"sequences": num_sequences, "context": context}
    for name, parts in measured.items():
        values |= {f"{name} {part}": round(statistics.median(parts[part]), 4) for part in PARTS}
    if "old" in measured:
        pairs = zip(measured["new"]["step"], measured["old"]["step"], strict=True)
        values["ratio"] = round(statistics.median(new / old for new, old in pairs), 3)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="another checkout to compare with")
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--overlap", action="store_true", help="let this checkout's steps overlap")
    args = parser.parse_args()
    restart_in_venv()
    old = args.old.resolve() if args.old else REPOSITORY if args.overlap else None
    checkouts = {"new": REPOSITORY} | ({"old": old} if old else {})
    rows = []
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(host_side(checkout)) for name, checkout in checkouts.items()}
        print(f"{'':4} sequences context " + " ".join(f"{part:>8}" for part in PARTS) + "  ms")
        for context in args.contexts:
            for num_sequences in args.sequences:
                values = row(
                    num_sequences,
                    context,
                    measure(sides, num_sequences, context, args.rounds, is_overlapped=args.overlap),
                )
                rows.append(values)
                for name in sorted(sides, reverse=True):
                    numbers = " ".join(f"{values[f'{name} {part}']:8.3f}" for part in PARTS)
                    print(f"{name:4} {num_sequences:9} {context:7} {numbers}", flush=True)
                if old:
                    print(f"{'':4} a step takes {values['ratio']} of the old one's time", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
