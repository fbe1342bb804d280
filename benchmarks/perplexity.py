"""Perplexity of a model in several forms, with the engine's own kernels, on chapters of a novel (benchmarks/texts).

    python benchmarks/perplexity.py [FORM ...] [--model FOLDER] [--tokens 4096] [--window 512]

A FORM is a dtype, a method of --quantize, or a method and a method of --quantize-head: `bfloat16 eetq int4 int4/none`.
A folder of another checkpoint is a form, too. Needs `make install`. The last line of standard output is JSON. Without
--model the demo model is used (built on first use).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.offline import demo_model, num_cores, restart_with_environment  # noqa: E402
from engine.link.config import EngineConfig  # noqa: E402

TEXT = REPOSITORY / "benchmarks" / "texts" / "persuasion.txt"
DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMS = ["bfloat16", "eetq/none", "eetq", "int4/none", "int4", "int4/int4"]


@functools.cache
def text_ids(folder: str) -> list[int]:
    """The novel in tokens of the folder's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(TEXT.read_text()).ids
    return ids


def engine_config(form: str, folder: str, **limits: int) -> EngineConfig:
    """`folder`'s model in a FORM of the command line."""
    options: dict[str, Any] = {"num_threads": num_cores(), "is_prefix_caching": False, **limits}
    if Path(form).is_dir():
        return EngineConfig(model_path=form, **options)
    if form in DTYPES:
        return EngineConfig(model_path=folder, dtype=form, **options)
    method, _, head = form.partition("/")
    return EngineConfig(model_path=folder, quantize=method, quantize_head=head or None, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", metavar="FORM", nargs="*", default=FORMS, help=f"default: {' '.join(FORMS)}")
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--window", type=int, default=512, help="tokens that are read at a time, starting afresh")
    args = parser.parse_args()
    restart_with_environment()
    from engine.quantize.perplexity import perplexity

    folder = args.model or demo_model()
    ids = text_ids(folder)[: args.tokens]
    result: dict[str, Any] = {"model": Path(folder).name, "tokens": len(ids), "window": args.window, "perplexity": {}}
    for form in args.forms:
        started = time.monotonic()
        value = perplexity(engine_config(form, folder), ids, args.window)
        result["perplexity"][form] = round(value, 4)
        print(f"{form:24s} {value:9.4f}   ({time.monotonic() - started:.0f} s)", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
