"""A server started as a user starts it: the launcher as a child process, its log in a file, requests over HTTP."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

Events = list[dict[str, Any]]

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclasses.dataclass
class LaunchedServer:
    """A running launcher and how to reach what it serves."""

    process: subprocess.Popen[bytes]
    port: int
    log_path: Path
    hostname: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.hostname}:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def child(self, module: str) -> psutil.Process:
        """The child that runs `python -m module`."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if process.cmdline()[-2:] == ["-m", module]:
                return process
        raise AssertionError(f"no process runs {module}; log:\n{self.log}")

    def rank(self, rank: int) -> psutil.Process:
        """The child that is this rank of the engine."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if process.cmdline()[-2:] == ["-m", "engine"] and process.environ()["RANK"] == str(rank):
                return process
        raise AssertionError(f"no process is rank {rank}; log:\n{self.log}")

    def wait_for_ranks(self, number: int = 1) -> list[psutil.Process]:
        """All children, once so many ranks of the engine are among them."""
        while True:
            children = psutil.Process(self.process.pid).children(recursive=True)
            if sum(child.cmdline()[-2:] == ["-m", "engine"] for child in children) == number:
                return children
            time.sleep(0.01)

    def wait_for_log(self, text: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.log:
            assert self.process.poll() is None, f"the launcher ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"no {text!r} after {timeout_s} s:\n{self.log}"
            time.sleep(0.05)

    def wait_for_end(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        return self.process.wait(timeout_s)

    def generate(self, inputs: str, **parameters: Any) -> dict[str, Any]:
        body = {"inputs": inputs, "parameters": {"details": True, **parameters}}
        response = httpx.post(f"{self.url}/generate", json=body, timeout=600)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, inputs: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The events of /generate_stream, as they come."""
        body = {"inputs": inputs, "parameters": parameters}
        with httpx.stream("POST", f"{self.url}/generate_stream", json=body, timeout=600) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def info(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/info").json()
        return answer

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        pairs = (line.split() for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def read_streams(
    server: LaunchedServer, count: int, pool: ThreadPoolExecutor, max_new_tokens: int
) -> list[Future[Events]]:
    """`count` streams of so many tokens that are being read in threads; returns when each has its first token."""
    started: list[int] = []

    def read(index: int) -> Events:
        events = []
        parameters = {"max_new_tokens": max_new_tokens, "ignore_eos": True, "details": True}
        for event in server.stream(f"stream number {index}", **parameters):
            events.append(event)
            if len(events) == 1:
                started.append(index)
        return events

    futures = [pool.submit(read, index) for index in range(count)]
    while len(started) < count:
        time.sleep(0.01)
        assert not any(future.done() and future.exception() for future in futures)
    return futures


def heed_hang_ups() -> None:
    """The launcher rightly ignores SIGHUP under nohup; these tests may be run under it, and send SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def launched(
    model: Path | str | None,
    log_dir: Path,
    *flags: str,
    environ: Mapping[str, str] | None = None,
    is_awaited: bool = True,
    port: int | None = None,
    hostname: str = "127.0.0.1",
    directory: Path | None = None,
) -> Iterator[LaunchedServer]:
    """Start the launcher; at the end of the block nothing of it is left, whatever happened.

    Without a `model` it gets no flags but `flags`, and `environ` says what to serve where.
    """
    port = port or free_port()
    log_path = log_dir / f"launcher-{port}-{len(list(log_dir.iterdir()))}.log"
    command = [sys.executable, "-P", "-m", "server.launcher"]
    if model is not None:
        command += ["--model-id", str(model), "--port", str(port), "--hostname", hostname]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, **(environ or {})},
            preexec_fn=heed_hang_ups,
        )
    server = LaunchedServer(process, port, log_path, hostname)
    try:
        if is_awaited:
            server.wait_for_log("Connected")
        yield server
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        survivors: list[Any] = [process, *children]
        for survivor in survivors:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                survivor.kill()
        process.wait()
