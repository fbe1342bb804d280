"""Runs the parts one after the other and prints one table last. Exit code 1 if anything failed.

A host needs Python 3.11 or newer, torch 2.8 or newer with CUDA, Triton 3.6 or newer, NumPy and safetensors; no network,
and nothing of ours installed. Two wheels must come along where the host lacks them, 4 MB together: msgspec and
llguidance. The part `generate` measures transformers where it is installed. docs/gpu-results/README.md says how to
fetch the wheels.

Leaves in the folder: result.json, table.txt, log.txt, and tuning.json with the tiles that were best on this card,
for `quant/kernels/tuned_tiles.json`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.parts import LEFT_OUT, PARTS, PASSED, SANITIZED, Part, run_part
from benchmarks.gpu_proof.settings import Settings
from benchmarks.gpu_proof.table import results_text

DEADLINE_S = 480.0
INTERPRETER_PATIENCE = 4.0
"""The interpreter runs where other processes may take most of the processor."""
TUNING_FACT = "tuning"
"""The fact of a part that becomes a file of its own."""


def run_proof(
    settings: Settings, parts: Mapping[str, Part], deadline_s: float = DEADLINE_S, patience: float = 1.0
) -> dict[str, Any]:
    """Run the parts, and leave the results in the folder of `settings`; returns what result.json says.

    Each part has `patience` times the time that it may take on a card.
    """
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results: dict[str, Any] = {}
    with (folder / "log.txt").open("w") as log:
        for name, part in parts.items():
            left_s = deadline_s - (time.monotonic() - started)
            print(f"{name} ...", end=" ", flush=True)
            if left_s > 0:
                results[name] = run_part(name, part, settings, log, min(patience * part.deadline_s, left_s))
            else:
                results[name] = {
                    "status": "not run: no time was left",
                    "seconds": 0,
                    "checks": [],
                    "tables": {},
                    "facts": {},
                }
            print(f"{results[name]['status']}, {results[name]['seconds']} s", flush=True)
    result = _result(settings, results)
    for name in parts:
        settings.part_file(name).unlink(missing_ok=True)
    _write(folder, result)
    return result


def _result(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    """Everything that is known of the run."""
    facts = {name: value for part in results.values() for name, value in part["facts"].items()}
    return {
        "card": facts.get("card", "unknown card"),
        "date": datetime.date.today().isoformat(),
        "is_measured": not settings.is_interpreted and not settings.is_toy,
        "is_passed": all(part["status"].startswith((PASSED, LEFT_OUT)) for part in results.values()),
        "seed": settings.seed,
        "versions": _versions(),
        "facts": facts,
        "parts": results,
    }


def _versions() -> dict[str, str]:
    """Versions of what computes, as far as it is installed."""
    versions = {"Python": platform.python_version()}
    for name in "torch triton numpy transformers".split():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def _write(folder: Path, result: dict[str, Any]) -> None:
    tuning = result["facts"].pop(TUNING_FACT, None)
    if tuning and result["is_measured"]:
        (folder / "tuning.json").write_text(json.dumps(tuning, indent=1) + "\n")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "table.txt").write_text(results_text(result))


def chosen_parts(names: str | None, *, is_sanitizing: bool) -> dict[str, Part]:
    """The parts by their names, separated by commas; None: all. Raises SystemExit for a name that none has."""
    parts = dict(PARTS)
    if is_sanitizing:
        parts["sanitizer"] = SANITIZED
    if names is None:
        return parts
    if unknown := [name for name in names.split(",") if name not in parts]:
        raise SystemExit(f"no part is called {', '.join(unknown)}: there are {', '.join(parts)}")
    return {name: part for name, part in parts.items() if name in names.split(",")}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "interpreted"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="sizes that take a minute in the interpreter")
    parser.add_argument(
        "--sanitize", action="store_true", help="checks once more under compute-sanitizer, if installed"
    )
    parser.add_argument("--parts", help=f"separated by commas, of {', '.join(PARTS)}")
    parser.add_argument(
        "--out", default=os.environ.get("OUT", "build/gpu-proof"), help="default: $OUT, or build/gpu-proof"
    )
    parser.add_argument("--seed", type=int, help="of all random inputs; drawn if left out, and printed")
    arguments = parser.parse_args()
    seed = random.randrange(2**31) if arguments.seed is None else arguments.seed
    out = str(Path(arguments.out).resolve())
    settings = Settings(arguments.device, arguments.toy, seed, out)
    print(f"seed {seed}, results in {out}", flush=True)
    deadline_s = DEADLINE_S + (SANITIZED.deadline_s if arguments.sanitize else 0)
    patience = INTERPRETER_PATIENCE if settings.is_interpreted else 1.0
    parts = chosen_parts(arguments.parts, is_sanitizing=arguments.sanitize)
    result = run_proof(settings, parts, patience * deadline_s, patience)
    print()
    print(results_text(result), end="", flush=True)
    return 0 if result["is_passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
