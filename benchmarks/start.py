"""The start of a server with warm caches, against importing torch and numba alone, in turns.

    python benchmarks/start.py [--model FOLDER] [--rounds 7] [--write]

A start ends with the log's `Connected`. Shown are seconds, the quickest and the median of the rounds, seconds of
processor time of all processes, and when each line of the log came in the quickest start. Other processes only make a
round slower; a round in which the machine's load is above 1 at its beginning is taken again, unless --any-load. Prints
Markdown; --write puts it into docs/performance.md. Needs `make install`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.documents import measured_on, print_and_write  # noqa: E402
from benchmarks.offline import demo_model, num_cores, restart_in_venv  # noqa: E402

DOCUMENT = REPOSITORY / "docs" / "performance.md"
BEGIN, END = "<!-- made by benchmarks/start.py -->", "<!-- end of the start -->"
IMPORT = [sys.executable, "-c", "import torch, numba"]
MAX_LOAD = 1.0
READY = "Connected"
STEPS = {
    "processes start": "Starting shard",
    "weights are loaded": "Weights loaded",
    "caches and vocabulary are there": "Warming up",
    "warm-up is over": "Warm-up took",
    "requests are answered": READY,
}
"""What has been done -> the beginning of the line that tells it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    seconds: float
    processor_s: float
    lines: dict[str, float]
    """Each of STEPS, with the seconds at which it was told."""


def children_s() -> float:
    """Processor time of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def import_libraries() -> Start:
    before, started = children_s(), time.perf_counter()
    subprocess.run(IMPORT, check=True)
    return Start(time.perf_counter() - started, children_s() - before, {})


def start_server(folder: str) -> Start:
    """Start a server, and stop it once it answers. Raises RuntimeError with the log if it ends before."""
    command = [sys.executable, "-m", "pytgi", "serve", folder, "--port", str(free_port())]
    before, started, log = children_s(), time.perf_counter(), []
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    assert server.stdout is not None
    lines: dict[str, float] = {}
    for line in server.stdout:
        log.append(line)
        seconds = time.perf_counter() - started
        for step, text in STEPS.items():
            if f": {text}" in line:
                lines.setdefault(step, seconds)
        if f": {READY}" in line:
            break
    server.send_signal(signal.SIGTERM)
    server.communicate()
    if f": {READY}" not in log[-1]:
        raise RuntimeError("".join(log))
    return Start(seconds, children_s() - before, lines)


def wait_for_quiet() -> None:
    while os.getloadavg()[0] > MAX_LOAD:
        print(f"load {os.getloadavg()[0]:.1f}: waiting", file=sys.stderr, flush=True)
        time.sleep(10)


def measure(folder: str, num_rounds: int, *, any_load: bool) -> tuple[list[Start], list[Start]]:
    """Imports and starts of each round, after a start that fills the caches."""
    start_server(folder)
    imports, starts = [], []
    for _ in range(num_rounds):
        if not any_load:
            wait_for_quiet()
        imports.append(import_libraries())
        starts.append(start_server(folder))
    return imports, starts


def report(imports: list[Start], starts: list[Start]) -> list[str]:
    def row(name: str, runs: list[Start]) -> str:
        seconds = [run.seconds for run in runs]
        work = min(run.processor_s for run in runs)
        return f"| {name} | {min(seconds):.2f} | {statistics.median(seconds):.2f} | {work:.2f} |"

    lines = ["| | s, quickest | s, median | processor time, s |", "|---|---|---|---|"]
    lines += [row("importing torch and numba", imports), row("start until it answers", starts)]
    more = [start.seconds - alone.seconds for alone, start in zip(imports, starts, strict=True)]
    lines.append(f"| the difference, round by round | {min(more):.2f} | {statistics.median(more):.2f} | |")
    quickest = min(starts, key=lambda start: start.seconds)
    told = ", ".join(f"{step} at {quickest.lines[step]:.2f} s" for step in STEPS if step in quickest.lines)
    return [*lines, "", f"In the quickest start {told}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--any-load", action="store_true", help="do not wait until the machine's load is 1 or less")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    args = parser.parse_args()
    restart_in_venv()
    folder = args.model or demo_model()
    lines = [measured_on(num_cores(), folder), ""]
    lines += report(*measure(folder, args.rounds, any_load=args.any_load))
    print_and_write(lines, DOCUMENT if args.write else None, BEGIN, END)


if __name__ == "__main__":
    main()
