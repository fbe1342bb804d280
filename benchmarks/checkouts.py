"""Speed of two checkouts of this repository, in turns on one machine: whether a change makes the engine slower.

    python benchmarks/checkouts.py OLD NEW [--model FOLDER] [--forms bfloat16 eetq] [--rounds 9]

Each checkout loads the model in a process of its own, which then decodes one sequence and reads a prompt whenever it is
asked. The ratio of a round is of runs that follow each other; the median of the ratios counts, since neighbours move
the speed of the machine. The last line of standard output is JSON. Without --model the demo model is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.offline import demo_model, num_cores, restart_in_venv  # noqa: E402
from benchmarks.perplexity import text_ids  # noqa: E402
from benchmarks.sides import Side  # noqa: E402
from engine.link.environment import engine_environment  # noqa: E402

PROMPT_TOKENS = 512
NEW_TOKENS = 48
KINDS = ("prefill", "decode")


def checkout_side(checkout: Path, form: str, folder: str) -> Side:
    environ = {**os.environ, "PYTHONPATH": str(checkout)}
    environ |= engine_environment(num_cores(), environ)
    return Side(sys.executable, str(checkout / "benchmarks" / "side_pytgi.py"), [form, folder], environ)


def ratios(old: Path, new: Path, form: str, folder: str, rounds: int) -> dict[str, list[float]]:
    """Speed of the new checkout over the old one's, round by round; the first round warms up and does not count."""
    prompt_ids = text_ids(folder)[:PROMPT_TOKENS]
    measured: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with checkout_side(old, form, folder) as before, checkout_side(new, form, folder) as after:
        for index in range(rounds + 1):
            sides = [before, after] if index % 2 else [after, before]
            took = {side: side.ask(prompt_ids=prompt_ids, num_tokens=NEW_TOKENS) for side in sides}
            for kind in KINDS if index else ():
                measured[kind].append(took[before][f"{kind}_s"] / took[after][f"{kind}_s"])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--forms", nargs="+", default=["bfloat16", "eetq"], help="forms as in perplexity.py")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    restart_in_venv()
    folder = args.model or demo_model()
    result = {}
    for form in args.forms:
        for kind, values in ratios(args.old.resolve(), args.new.resolve(), form, folder, args.rounds).items():
            result[f"{form} {kind}"] = round(statistics.median(values), 3)
            spread = f"{min(values):.3f} to {max(values):.3f}"
            print(f"{form} {kind}: {result[f'{form} {kind}']} (rounds {spread})", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
