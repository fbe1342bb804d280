"""The table of parts, and how one is run: in a process of its own, until its deadline."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu_proof.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
SANITIZER = "compute-sanitizer"
SANITIZER_EXIT_CODE = 86


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One part of the proof."""

    entry: str
    """Lazy "module:function", called with `Settings` and a `Report`."""
    deadline_s: float
    runs_kernels: bool = True
    """Whether its kernels run, in Triton's interpreter where there is no card; they are only compiled otherwise."""
    is_sanitized: bool = False
    """Whether it runs under compute-sanitizer's memcheck."""
    is_ours: bool = True
    """Whether it proves something of ours; what becomes of others is only told."""


PARTS: dict[str, Part] = {
    "card": Part("benchmarks.gpu_proof.card:run", 40),
    "compile": Part("benchmarks.gpu_proof.compiling:run", 90, runs_kernels=False),
    "correctness": Part("benchmarks.gpu_proof.correctness:run", 120),
    "kernels": Part("benchmarks.gpu_proof.kernels:run", 150),
    "model": Part("benchmarks.gpu_proof.model:run", 150),
    "generate": Part("benchmarks.gpu_proof.generate:run", 90, runs_kernels=False, is_ours=False),
}
"""In the order in which they run: later ones read the ceilings that the first one measured."""

SANITIZED = Part("benchmarks.gpu_proof.correctness:run_few", 110, is_sanitized=True)

PASSED, LEFT_OUT = "passed", "left out"
"""The beginnings of a status that is no failure."""


def run_part(name: str, part: Part, settings: Settings, log: TextIO, limit_s: float) -> dict[str, Any]:
    """Run a part for at most `limit_s`; what it found, with its `status` and `seconds`."""
    path = settings.part_file(name)
    path.unlink(missing_ok=True)
    if part.is_sanitized and shutil.which(SANITIZER) is None:
        return _results(path) | {"status": f"{LEFT_OUT}: {SANITIZER} is not installed", "seconds": 0.0}
    log.write(f"\n==== {name} ====\n")
    log.flush()
    command = [sys.executable, "-m", "benchmarks.gpu_proof.worker", part.entry, settings.dump(), str(path)]
    if part.is_sanitized:
        command = [
            SANITIZER,
            "--tool",
            "memcheck",
            "--target-processes",
            "all",
            "--error-exitcode",
            str(SANITIZER_EXIT_CODE),
            *command,
        ]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=REPOSITORY,
        env=_environment(part, settings),
        start_new_session=True,
    )
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process)
    results = _results(path)
    status, seconds = _status(results, code, limit_s), round(time.monotonic() - started, 1)
    return results | {
        "status": status if part.is_ours or status == PASSED else f"{LEFT_OUT}: {status}",
        "seconds": seconds,
    }


def _environment(part: Part, settings: Settings) -> dict[str, str]:
    """What libraries read when they are imported."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [environ.get("PYTHONPATH")])])
    environ["PYTHONUNBUFFERED"] = "1"
    environ["HF_HUB_OFFLINE"] = "1"
    environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or deterministic cuBLAS, which poisoned outputs ask for, refuses
    if settings.is_interpreted and part.runs_kernels:
        environ["TRITON_INTERPRET"] = "1"
    if part.is_sanitized:
        environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or a read beyond a tensor still finds memory of the cache
    return environ


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _results(path: Path) -> dict[str, Any]:
    """What a part has left in its file; nothing, if it has left none."""
    results: dict[str, Any] = {"checks": [], "tables": {}, "facts": {}}
    if path.exists():
        results |= json.loads(path.read_text())
    return results


def _status(results: dict[str, Any], code: int | None, limit_s: float) -> str:
    num_failed = sum(not check["is_ok"] for check in results["checks"])
    if code is None:
        return f"stopped at its deadline of {limit_s:.0f} s"
    if code == SANITIZER_EXIT_CODE:
        return f"{SANITIZER} found errors"
    if code != 0:
        return f"crashed with exit code {code}"
    if "left_out" in results["facts"]:
        return f"{LEFT_OUT}: {results['facts'].pop('left_out')}"
    if num_failed:
        return f"{num_failed} of {len(results['checks'])} checks failed"
    if not results["checks"]:
        return "checked nothing"
    return PASSED
