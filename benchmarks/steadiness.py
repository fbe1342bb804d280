"""How steadily streams get their tokens: while a long prompt is computed, and under load. The engine without HTTP.

    python benchmarks/steadiness.py [--old CHECKOUT] [--forms bfloat16 eetq] [--rounds 5] [--prompt 4096]

Two loads: four streams decode while a prompt arrives; sixteen requests at a time, 24 of 256 tokens in and 128 out. With
--old, rounds of another checkout of this repository are interleaved with this one's, and the median of the rounds'
ratios is shown, too. The last line of standard output is JSON. The demo model is used (built on first use).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.offline import demo_model, num_cores, restart_in_venv  # noqa: E402
from benchmarks.sides import Side  # noqa: E402
from engine.link.environment import engine_environment  # noqa: E402
from server.bench.statistics import percentile  # noqa: E402

LOADS = {"intrude": 4096, "serve": 24}


def steady_side(checkout: Path, form: str, folder: str) -> Side:
    environ = {**os.environ, "PYTHONPATH": str(checkout)}
    environ |= engine_environment(num_cores(), environ)
    return Side(sys.executable, "side_steadiness.py", [form, folder], environ)


def figures(answer: dict[str, Any]) -> dict[str, float]:
    """Seconds, and tokens per second where the load measures them."""
    values = {f"gap_p{percent}": percentile(sorted(answer["gaps"]), percent) for percent in (50, 90, 99)}
    values |= {f"first_token_p{percent}": percentile(sorted(answer["first_token_s"]), percent) for percent in (50, 90)}
    if "quiet_gaps" in answer:
        values["quiet_gap_p50"] = percentile(sorted(answer["quiet_gaps"]), 50)
    if "tokens_per_s" in answer:
        values["tokens_per_s"] = answer["tokens_per_s"]
    return values


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of each side's rounds, and of the ratios new / old."""
    result = {
        side: {key: round(statistics.median(r[side][key] for r in rounds), 3) for key in rounds[0][side]}
        for side in rounds[0]
    }
    if "old" in result:
        result["ratio"] = {
            key: round(statistics.median(r["new"][key] / r["old"][key] for r in rounds), 3) for key in result["old"]
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="another checkout to compare with")
    parser.add_argument("--forms", nargs="+", default=["bfloat16", "eetq"], help="forms as in perplexity.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt that arrives")
    args = parser.parse_args()
    restart_in_venv()
    checkouts = {"new": REPOSITORY} | ({"old": args.old.resolve()} if args.old else {})
    results = {}
    for form in args.forms:
        with contextlib.ExitStack() as stack:
            sides = {
                name: stack.enter_context(steady_side(checkout, form, demo_model()))
                for name, checkout in checkouts.items()
            }
            for load, size in (LOADS | {"intrude": args.prompt}).items():
                rounds = []
                for index in range(args.rounds):
                    order = sorted(sides, reverse=bool(index % 2))
                    answers = {name: sides[name].ask(load=load, seed=index, size=size) for name in order}
                    rounds.append({name: figures(answer) for name, answer in answers.items()})
                results[f"{form} {load}"] = summary(rounds)
                for name, values in results[f"{form} {load}"].items():
                    print(f"{form} {load} {name}: {values} (load {os.getloadavg()[0]:.1f})", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
