"""One sequence against llama.cpp on this machine: a prompt of 512 tokens, then 64 decoded; what `make peers` runs.

    python benchmarks/peers.py [--isa native|avx2] [--rounds 5]

Per row both sides load the demo model once and take turns, with as many threads as there are cores; medians are
compared. llama.cpp (llama-cpp-python) is built for this machine in an environment of its own, once: that takes a C++
compiler and ten minutes. `--isa avx2` holds both sides to AVX2. Needs `make install`. The last line of standard output
is JSON; exit code 1 when a ratio is below what we demand of such a machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.offline import demo_model, num_cores, read_bandwidth, restart_in_venv  # noqa: E402
from benchmarks.perplexity import text_ids  # noqa: E402
from benchmarks.sides import BENCHMARKS, Side  # noqa: E402
from engine.link.environment import engine_environment, user_cache_dir  # noqa: E402
from tests.e2e.cached_environment import cached_environment  # noqa: E402

PROMPT_TOKENS, NEW_TOKENS = 512, 64
KINDS = ("prefill", "decode")
ROWS = {"16-bit": ("bfloat16", "F16"), "int8": ("eetq", "Q8_0"), "int4": ("int4", "Q4_0")}
"""What is compared -> our form and llama.cpp's. With its defaults, a Q4_0 file's output head is Q8_0 or Q6_K."""
AVX2_DECODE_RATIOS = {"int8": 1.5, "int4": 1.2}
"""Smallest ratios to llama.cpp on machines without VNNI and AMX; everything else that is judged must be 1.0."""

CMAKE_ARGS = {
    "native": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
    "avx2": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DLLAVA_BUILD=OFF",
}
OUR_ISA: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}


def has_integer_dot_product() -> bool:
    """Whether this CPU has VNNI or AMX."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return bool(words & {"avx512_vnni", "avx_vnni", "amx_int8"})


def llama_python(isa: str) -> str:
    print(f"llama.cpp for {isa}: built on first use, which takes ten minutes", file=sys.stderr)
    return str(cached_environment("llama", CMAKE_ARGS[isa]) / "bin" / "python")


def gguf_file(folder: Path, kind: str, python: str) -> Path:
    """The folder's weights as llama.cpp's own quantiser makes them, kept in the user's cache."""
    path = user_cache_dir(dict(os.environ)) / "gguf" / f"{folder.name}-{kind}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        if kind == "F16":
            from benchmarks.gguf_model import write_gguf

            write_gguf(folder, partial)
        else:
            source = gguf_file(folder, "F16", python)
            command = [python, str(BENCHMARKS / "side_llama.py"), "quantize", str(source), str(partial), kind]
            subprocess.run(command, stdout=sys.stderr, check=True)
        partial.rename(path)
    return path


def pytgi_side(form: str, folder: str, isa: str) -> Side:
    environ = {**os.environ, **OUR_ISA[isa]}
    environ |= engine_environment(num_cores(), environ)
    return Side(sys.executable, "side_pytgi.py", [form, folder], environ)


def compare(sides: Mapping[str, Side], prompt_ids: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Median tokens per second of pytgi and of the better of its peers, after a round for warming up."""
    measured: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in sides} for kind in KINDS}
    for round_index in range(rounds + 1):
        for name, side in sides.items():
            took = side.ask(prompt_ids=prompt_ids, num_tokens=NEW_TOKENS)
            if round_index:
                measured["prefill"][name].append(len(prompt_ids) / took["prefill_s"])
                measured["decode"][name].append((NEW_TOKENS - 1) / took["decode_s"])
    result = {}
    for kind, rates in measured.items():
        medians = {name: round(statistics.median(values), 2) for name, values in rates.items()}
        best_peer = max(rate for name, rate in medians.items() if name != "pytgi")
        result[kind] = {**medians, "ratio": round(medians["pytgi"] / best_peer, 2)}
    return result


def demanded(row: str, kind: str, is_vnni: bool) -> float | None:
    """The smallest ratio that passes; None if the row is not judged."""
    if row not in AVX2_DECODE_RATIOS:
        return None
    return 1.0 if is_vnni or kind == "prefill" else AVX2_DECODE_RATIOS[row]


def measure_row(row: str, folder: str, python: str, prompt_ids: list[int], args: argparse.Namespace) -> dict[str, Any]:
    form, kind = ROWS[row]
    file = gguf_file(Path(folder), kind, python)
    bandwidth = read_bandwidth()
    # libgomp's threads spin for milliseconds where they wait, unless told otherwise, as we tell ours: on a host with
    # neighbours this costs llama.cpp most of its speed, on a quiet one it may help. The better one counts.
    serve = ["serve", str(file), str(num_cores())]
    short_spin = {"GOMP_SPINCOUNT": engine_environment(num_cores(), {})["GOMP_SPINCOUNT"]}
    with (
        pytgi_side(form, folder, args.isa) as ours,
        Side(python, "side_llama.py", serve, os.environ) as theirs,
        Side(python, "side_llama.py", serve, {**os.environ, **short_spin}) as theirs_short_spin,
    ):
        sides = {"pytgi": ours, "llama.cpp": theirs, "llama.cpp, short spin": theirs_short_spin}
        result: dict[str, Any] = compare(sides, prompt_ids, args.rounds)
        read_bytes = {name: side.about["read_bytes"] for name, side in sides.items()}
    result["read_bandwidth_gb_s"] = round(max(bandwidth, read_bandwidth()), 1)
    is_vnni = args.isa == "native" and has_integer_dot_product()
    for kind in KINDS:
        result[kind]["demanded"] = demanded(row, kind, is_vnni)
    # What one token has to read over what the memory gives: the share of it that is reached.
    result["achieved_over_floor"] = {
        name: round(result["decode"][name] * size / 1e9 / result["read_bandwidth_gb_s"], 2)
        for name, size in read_bytes.items()
    }
    result["megabytes_read_per_token"] = {name: round(size / 1e6) for name, size in read_bytes.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=[*CMAKE_ARGS], default="native")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    restart_in_venv()
    folder = demo_model()
    python = llama_python(args.isa)
    prompt_ids = text_ids(folder)[:PROMPT_TOKENS]
    rows: dict[str, Any] = {}
    for row in ROWS:
        rows[row] = measure_row(row, folder, python, prompt_ids, args)
        print_row(row, rows[row])
    judged = [rates for result in rows.values() for rates in map(result.get, KINDS) if rates["demanded"]]
    passed = all(rates["ratio"] >= rates["demanded"] for rates in judged)
    about = {
        "model": Path(folder).name,
        "isa": args.isa,
        "cores": num_cores(),
        "has_vnni_or_amx": has_integer_dot_product(),
    }
    print(json.dumps({**about, "rows": rows, "passed": passed}))
    sys.exit(not passed)


def print_row(row: str, result: Mapping[str, Any]) -> None:
    for kind in KINDS:
        rates = dict(result[kind])
        ratio, demanded = rates.pop("ratio"), rates.pop("demanded")
        figures = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        print(
            f"{row:7s}{kind:8s}{figures} tokens/s: ratio {ratio:.2f}" + (f", demanded {demanded}" if demanded else "")
        )
    shares = ", ".join(f"{name} {share:.2f}" for name, share in result["achieved_over_floor"].items())
    print(f"{row:7s}decode  achieved / memory floor: {shares}", flush=True)


if __name__ == "__main__":
    main()
