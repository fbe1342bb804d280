"""What shards cost and gain on one host: speed and fraction of time in communication, by collectives.

    python benchmarks/scaling.py [FORM ...] [--model FOLDER] [--sizes 1 2] [--rounds 5]

A FORM as in perplexity.py. Shards share the cores that one process has otherwise. All sides of a form are loaded
together and take turns. Communication is what rank 0 spends in collectives, waiting for the others included. Prints a
table for docs/scaling.md, and JSON as the last line of standard output. Needs `make install`; ten minutes.
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

from benchmarks.offline import demo_model, num_cores, restart_with_environment  # noqa: E402
from benchmarks.perplexity import text_ids  # noqa: E402
from benchmarks.sides import Side  # noqa: E402
from engine.link.environment import engine_environment  # noqa: E402

FORMS = ["bfloat16", "eetq", "int4"]
COLLECTIVES = ("shared memory", "gloo")
KINDS = {"prefill": (512, 1), "decode": (16, 65)}
"""Prompt tokens and new tokens of a turn."""


def shards_side(form: str, folder: str, size: int, collectives: str) -> Side:
    environ = dict(os.environ)
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):  # those of this process are for all cores
        environ.pop(name, None)
    environ |= engine_environment(max(1, num_cores() // size), environ)
    return Side(sys.executable, "side_shards.py", [form, folder, str(size), collectives], environ)


def measure(form: str, folder: str, sizes: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second, fraction of time in communication, collectives of a token; by side and kind of work."""
    ids = text_ids(folder)
    variants = [(size, collectives) for size in sizes for collectives in (COLLECTIVES if size > 1 else COLLECTIVES[:1])]
    with contextlib.ExitStack() as stack:
        sides = {
            "1 shard" if size == 1 else f"{size} shards, {collectives}": stack.enter_context(
                shards_side(form, folder, size, collectives)
            )
            for size, collectives in variants
        }
        answers: dict[tuple[str, str], list[dict[str, float]]] = {}
        for round_index in range(rounds + 1):
            for name, side in sides.items():
                for kind, (num_prompt, num_new) in KINDS.items():
                    answer = side.ask(prompt_ids=ids[:num_prompt], num_tokens=num_new)
                    if round_index:
                        answers.setdefault((name, kind), []).append(answer)
    result: dict[str, dict[str, float]] = {name: {} for name in sides}
    for (name, kind), taken in answers.items():
        num_tokens = max(KINDS[kind])
        seconds = statistics.median(answer["seconds"] for answer in taken)
        share = statistics.median(answer["communication_s"] / answer["seconds"] for answer in taken)
        result[name] |= {f"{kind}_tokens_per_s": round(num_tokens / seconds, 1), f"{kind}_share": round(share, 3)}
        if kind == "decode":
            result[name]["collectives_per_token"] = round(taken[0]["collectives"] / num_tokens)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", metavar="FORM", nargs="*", default=FORMS, help=f"default: {' '.join(FORMS)}")
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2], help="numbers of shards")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    restart_with_environment()
    folder = args.model or demo_model()
    result: dict[str, Any] = {"model": Path(folder).name, "cores": num_cores()}
    print("| form | shards | decode, tokens/s (in communication) | prefill of 512, tokens/s (in communication) |")
    print("|---|---|---|---|")
    for form in args.forms:
        result[form] = measure(form, folder, args.sizes, args.rounds)
        for name, row in result[form].items():
            cells = (f"{row[f'{kind}_tokens_per_s']} ({row[f'{kind}_share']:.1%})" for kind in ("decode", "prefill"))
            print(f"| {form} | {name} | {' | '.join(cells)} |", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
