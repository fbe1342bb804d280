"""What is seen of the server while it serves: memory, descriptors and threads of its processes, metrics, tasks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.soak.wire import ask

HTTP_PROCESS = "server"
PROBE = Path(__file__).parent / "probe"
METRICS = "pytgi_kv_blocks_used pytgi_kv_blocks_cached pytgi_requests_running pytgi_requests_waiting".split()
TASKS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ProcessSample:
    """One process, or of several that run the same module the largest numbers of each kind."""

    resident: int
    """Bytes, shared pages included (RSS)."""
    anonymous: int
    """Bytes of it that no file stands behind. Others' use of the same files changes RSS, and nothing here."""
    descriptors: int
    threads: int

    count: int = 1
    """Processes that run this module."""

    def beside(self, other: ProcessSample) -> ProcessSample:
        return ProcessSample(
            max(self.resident, other.resident),
            max(self.anonymous, other.anonymous),
            max(self.descriptors, other.descriptors),
            max(self.threads, other.threads),
            self.count + other.count,
        )


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    seconds: float
    processes: dict[str, ProcessSample]
    """Module -> what is known of it."""
    metrics: dict[str, float]
    num_tasks: int
    """asyncio tasks of the HTTP process."""
    load_average: float
    """The machine's, over a minute; what other programs do is in it."""

    @property
    def is_idle(self) -> bool:
        return not any(self.metrics[name] for name in METRICS if name != "pytgi_kv_blocks_cached")


class Watch:
    """A watcher of one launched server, whose HTTP process has the probe."""

    def __init__(self, launcher: psutil.Process, port: int, counted_tasks: Path) -> None:
        self._launcher = launcher
        self._port = port
        self._counted_tasks = counted_tasks
        self.started = time.monotonic()

    async def sample(self) -> Sample:
        seconds = time.monotonic() - self.started
        metrics = parse_metrics((await ask(self._port, "/metrics")).body.decode())
        seen = {name: metrics[name] for name in METRICS}
        return Sample(seconds, self._processes(), seen, await self._num_tasks(), os.getloadavg()[0])

    def _processes(self) -> dict[str, ProcessSample]:
        found: dict[str, ProcessSample] = {}
        for process in (self._launcher, *self._launcher.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                name, sample = module_of(process), sample_process(process)
                found[name] = found[name].beside(sample) if name in found else sample
        return found

    async def _num_tasks(self) -> int:
        """The tasks of the HTTP process, but for the one that answered for metrics, which has ended."""
        (process,) = (child for child in self._launcher.children() if module_of(child) == HTTP_PROCESS)
        path = self._counted_tasks / str(process.pid)
        path.unlink(missing_ok=True)
        process.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + TASKS_TIMEOUT_S
        while not path.exists() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return int(path.read_text())

    async def drained(self, base: Sample | None, timeout_s: float) -> Sample:
        """The server once nothing runs, and nothing is left that `base` has not; or as it is after the time."""
        deadline = time.monotonic() + timeout_s
        while True:
            sample = await self.sample()
            if (sample.is_idle and not (base and leftovers(base, sample))) or time.monotonic() > deadline:
                return sample
            await asyncio.sleep(0.25)


def leftovers(base: Sample, sample: Sample) -> list[str]:
    """What `sample` has more of than `base`: processes, descriptors, tasks."""
    found = [
        f"{after - before} {field} of {name}"
        for name, process in base.processes.items()
        if name in sample.processes
        for field in ("count", "descriptors")
        if (after := getattr(sample.processes[name], field)) > (before := getattr(process, field))
    ]
    if sample.num_tasks > base.num_tasks:
        found.append(f"{sample.num_tasks - base.num_tasks} tasks of {HTTP_PROCESS}")
    return found


def module_of(process: psutil.Process) -> str:
    """What the process runs: `python -P -m MODULE ...`."""
    command = process.cmdline()
    if not command:
        raise psutil.NoSuchProcess(process.pid)
    return command[command.index("-m") + 1] if "-m" in command else Path(command[0]).name


def sample_process(process: psutil.Process) -> ProcessSample:
    memory = process.memory_info()
    return ProcessSample(memory.rss, memory.rss - memory.shared, process.num_fds(), process.num_threads())


def parse_metrics(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def probed(counted_tasks: Path, python_path: str) -> dict[str, str]:
    """The environment of a server whose tasks are counted."""
    return {"PYTHONPATH": f"{PROBE}:{python_path}", "COUNTED_TASKS": str(counted_tasks)}
