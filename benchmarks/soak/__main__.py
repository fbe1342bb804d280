"""Starts a server, loads it for hours, ends it, judges it and writes the report. Exit code 1 if a check failed.

The report goes to docs/soak if the load takes 30 minutes or more, otherwise to build/soak, where the server's log is in
any case.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from benchmarks.soak import bodies
from benchmarks.soak.clients import Repeats
from benchmarks.soak.judging import Soak, judge
from benchmarks.soak.load import Load, Tally
from benchmarks.soak.report import write_report
from benchmarks.soak.samples import Sample, Watch, probed
from tests.e2e.conftest import build_demo_model
from tests.e2e.launched import LaunchedServer, launched

REPOSITORY = Path(__file__).resolve().parents[2]
WINDOW = 2048
WARM_UP = 0.1
"""Part of the time that the load runs before the first sample of the idle server is taken."""
MAX_WARM_UP_S = 300.0
MAX_INTERVAL_S = 10.0
NUM_SAMPLES = 200
"""Samples of a run that is too short for one in ten seconds."""
DRAIN_TIMEOUT_S = 60.0
END_TIMEOUT_S = 120.0
PROGRESS_S = 60.0
NUM_RESTARTS = 8
MIN_KEPT_MINUTES = 30.0

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how hard."""

    model: Path
    folder: Path
    """Where the server's log goes."""
    seconds: float
    num_clients: int
    num_restarts: int
    """How often all clients are restarted."""
    seed: int = 0


@contextlib.contextmanager
def served(model: Path, folder: Path, *flags: str) -> Iterator[tuple[LaunchedServer, Watch]]:
    """A server whose tasks are counted, and its watcher; the log is in `folder`."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    environ = probed(tasks, os.environ.get("PYTHONPATH") or str(REPOSITORY))
    with launched(model, folder, "--max-total-tokens", str(WINDOW), *flags, environ=environ) as server:
        yield server, Watch(psutil.Process(server.process.pid), server.port, tasks)


def run_soak(settings: Settings, say: Say) -> Soak:
    """Start a server, soak it and end it."""
    with served(settings.model, settings.folder) as (server, watch):
        return with_its_end(asyncio.run(soak_server(server, watch, settings, say)), server)


def with_its_end(soak: Soak, server: LaunchedServer) -> Soak:
    """End the server as a service manager does."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    exit_code = server.process.wait(END_TIMEOUT_S)
    survivors = psutil.wait_procs(children, timeout=5)[1]
    return dataclasses.replace(soak, log=server.log, exit_code=exit_code, num_survivors=len(survivors))


async def soak_server(server: LaunchedServer, watch: Watch, settings: Settings, say: Say) -> Soak:
    """Load a server that runs already, and watch it; it goes on running."""
    load = Load(server.port, Repeats(bodies.repeated_calls()), settings.num_clients, WINDOW, settings.seed)
    await load.ask_each()
    await load.fill_pools()
    await load.put_on(min(MAX_WARM_UP_S, WARM_UP * settings.seconds), Tally())
    base = await watch.drained(None, DRAIN_TIMEOUT_S)
    say(line_of(base, Tally()))
    tally, samples = Tally(), list[Sample]()
    watch.started = time.monotonic()
    async with asyncio.TaskGroup() as group:  # a server that can't be watched any more ends the load
        watching = group.create_task(take_samples(watch, samples, tally, settings.seconds, say))
        await load.put_on(settings.seconds, tally, settings.num_restarts)
        watching.cancel()
    final = await watch.drained(base, DRAIN_TIMEOUT_S)
    say(line_of(final, tally))
    return Soak(settings.seconds, base, samples, final, tally, server.log, exit_code=0, num_survivors=0)


async def take_samples(watch: Watch, samples: list[Sample], tally: Tally, seconds: float, say: Say) -> None:
    next_line_s = PROGRESS_S
    while True:
        samples.append(await watch.sample())
        if samples[-1].seconds >= next_line_s:
            next_line_s += PROGRESS_S
            say(line_of(samples[-1], tally))
        await asyncio.sleep(min(MAX_INTERVAL_S, seconds / NUM_SAMPLES))


def line_of(sample: Sample, tally: Tally) -> str:
    parts = [
        f"{name} {process.resident / 1e6:.0f} MB {process.descriptors} fds"
        for name, process in sample.processes.items()
        if name in ("engine", "server")
    ]
    return (
        f"{sample.seconds / 60:6.1f} min: {tally.num_requests} requests, {tally.num_wrong} wrong; "
        f"{', '.join(parts)}; {sample.num_tasks} tasks, {sample.metrics['pytgi_kv_blocks_used']:.0f} blocks"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=480.0, help="of the load (default: 480)")
    parser.add_argument("--clients", type=int, default=16, help="at a time (default: 16)")
    parser.add_argument("--model", type=Path, help="a folder (default: the small demo model)")
    parser.add_argument("--seed", type=int, default=0, help="of what the clients choose")
    parser.add_argument("--out", type=Path, help="the report's folder")
    arguments = parser.parse_args()
    work = REPOSITORY / "build" / "soak"
    out = arguments.out or (REPOSITORY / "docs" / "soak" if arguments.minutes >= MIN_KEPT_MINUTES else work)
    model = arguments.model or build_demo_model("--small")
    settings = Settings(model, work, 60 * arguments.minutes, arguments.clients, NUM_RESTARTS, arguments.seed)
    soak = run_soak(settings, lambda line: print(line, flush=True))
    checks = judge(soak)
    write_report(soak, checks, f"make soak MINUTES={arguments.minutes:g}", out)
    for check in checks:
        print(f"{'ok' if check.is_ok else 'FAILED':6} {check.name}: {'; '.join(check.complaints) or check.figures}")
    print(f"{soak.tally.num_requests} requests; the report is {out / 'README.md'}")
    return 0 if all(check.is_ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
