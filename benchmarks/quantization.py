"""What each quantisation costs and gains on this machine: memory, load time, perplexity, speed of one sequence.

    python benchmarks/quantization.py [FORM ...] [--model FOLDER] [--rounds 5] [--tokens 4096]

A FORM as in perplexity.py, a folder included; `gptq` and `awq` are what `text-generation-server quantize` makes of the
model with its defaults and another text, once: they are kept in the user's cache. Each form has a process of its own,
with a KV cache of 1024 tokens; its peak is that of loading and serving. Prints a table for docs/quantization.md, and
JSON as the last line of standard output. Needs `make install`; ten minutes, and as much for each that is made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.offline import demo_model, num_cores, restart_with_environment  # noqa: E402
from benchmarks.peers.table import pytgi_side  # noqa: E402
from benchmarks.perplexity import TEXT, engine_config, text_ids  # noqa: E402
from engine.link.environment import user_cache_dir  # noqa: E402

PROMPT_TOKENS, NEW_TOKENS = 512, 64
MADE = ("gptq", "awq")
FORMS = ["bfloat16", "eetq", "int4", *MADE]
CALIBRATION_TEXT = TEXT.with_name("pride_and_prejudice.txt")
COLUMNS = {
    "weights_mb": "weights, MB",
    "load_s": "load, s",
    "peak_mb": "peak, MB",
    "perplexity": "perplexity",
    "decode_tokens_per_s": "decode, tokens/s",
    "prefill_tokens_per_s": "prefill of 512, tokens/s",
}


def made_folder(method: str, folder: str) -> str:
    """The folder's model as `text-generation-server quantize` makes it."""
    path = user_cache_dir(dict(os.environ)) / "quantised" / f"{Path(folder).name}-{method}"
    if not (path / "config.json").exists():
        command = [sys.executable, "-P", "-m", "engine.cli", "quantize", folder, str(path), "--method", method]
        options = ["--dataset", str(CALIBRATION_TEXT), "--perplexity-tokens", "0"]
        subprocess.run([*command, *options], stdout=sys.stderr, check=True)
    return str(path)


def measure(form: str, folder: str, rounds: int, num_scored: int) -> dict[str, float]:
    """`COLUMNS` of one form; the speeds are medians after a round for warming up."""
    from engine.quantize.perplexity import perplexity

    ids = text_ids(folder)
    with pytgi_side(form, folder, "native") as side:
        answers = [side.ask(prompt_ids=ids[:PROMPT_TOKENS], num_tokens=NEW_TOKENS) for _ in range(rounds + 1)]
        about = side.about
    decode_s, prefill_s = (
        statistics.median(answer[key] for answer in answers[1:]) for key in ("decode_s", "prefill_s")
    )
    return {
        "weights_mb": round(about["weight_bytes"] / 1e6),
        "load_s": round(about["load_s"], 1),
        "peak_mb": round(answers[-1]["peak_bytes"] / 1e6),
        "perplexity": round(perplexity(engine_config(form, folder), ids[:num_scored]), 3),
        "decode_tokens_per_s": round((NEW_TOKENS - 1) / decode_s, 1),
        "prefill_tokens_per_s": round(PROMPT_TOKENS / prefill_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", metavar="FORM", nargs="*", default=FORMS, help=f"default: {' '.join(FORMS)}")
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text that are scored")
    args = parser.parse_args()
    restart_with_environment()
    folder = args.model or demo_model()
    print(f"| | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
    rows = {}
    for form in args.forms:
        name = Path(form).name if Path(form).is_dir() else form
        what = made_folder(form, folder) if form in MADE else form
        rows[name] = measure(what, folder, args.rounds, args.tokens)
        print(f"| {name} | {' | '.join(str(rows[name][column]) for column in COLUMNS)} |", flush=True)
    about: dict[str, Any] = {"model": Path(folder).name, "cores": num_cores(), "rows": rows}
    print(json.dumps(about))


if __name__ == "__main__":
    main()
