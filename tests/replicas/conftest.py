"""Replicas of the small demo model on a Ray of their own, behind one front, as a user starts them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import build_demo_model
from tests.e2e.launched import free_port

START_TIMEOUT_S = 300.0
FLAGS = ["--max-total-tokens", "2048"]


@dataclasses.dataclass
class Fleet:
    """A running front, and what is behind it."""

    process: subprocess.Popen[bytes]
    port: int
    log_path: Path
    model: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def ray_address(self) -> str:
        return self.log.split("RAY_ADDRESS=")[1].split()[0]

    def replicas(self) -> dict[str, psutil.Process]:
        """Address -> actor of every server that runs."""
        found = {}
        for process in psutil.process_iter(["cmdline", "environ"]):
            line = process.info["cmdline"] or []
            if "server.replicas.held_launcher" in line and str(self.model) in line:
                flags = dict(zip(line, line[1:], strict=False))
                found[f"{flags['--hostname']}:{flags['--port']}"] = process.parent()
        return {address: actor for address, actor in found.items() if actor is not None}

    def wait_for_replicas(self, count: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return once so many replicas are in the front's metrics, and no others run."""
        deadline = time.monotonic() + timeout_s
        while len(self.metrics("tgi_request_count")) != count or len(self.replicas()) != count:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.5)

    def metrics(self, name: str) -> dict[str, float]:
        """Replica -> value of a metric without other labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        head = f'{name}{{replica="'
        return {
            line.removeprefix(head).split('"')[0]: float(line.split()[-1]) for line in lines if line.startswith(head)
        }

    def deploy(self, args: dict[str, Any]) -> None:
        """Hand Serve another version of the application; returns when it runs."""
        args = {"host": "127.0.0.1", **args}
        script = (
            "import sys, ray; from ray import serve; from server.replicas.deployment import APP_NAME, build_app\n"
            f"ray.init(namespace='serve'); serve.run(build_app({args!r}), name=APP_NAME, route_prefix=None)"
        )
        environ = {**os.environ, "RAY_ADDRESS": self.ray_address, "RAY_AUTH_MODE": "token"}
        done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def running_fleet(model: Path, folder: Path, *flags: str) -> Iterator[Fleet]:
    """Two replicas of the model, one thread each, where `folder` has a package with the name of one of ours."""
    port, log_path = free_port(), folder / "log"
    (folder / "server").mkdir()
    (folder / "server" / "__init__.py").write_text("raise ImportError('somebody else's')")
    command = [sys.executable, "-P", "-m", "pytgi", "serve", str(model), "--replicas", "2", "--port", str(port)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--hostname", "127.0.0.1", *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        )
    fleet = Fleet(process, port, log_path, model)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Connected" not in fleet.log:
            assert process.poll() is None and time.monotonic() < deadline, fleet.log
            time.sleep(0.2)
        yield fleet
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(build_demo_model("--small"), tmp_path_factory.mktemp("fleet"), *FLAGS) as fleet:
        assert httpx.get(f"{fleet.url}/health").status_code == 200  # no replica says so before the front
        yield fleet
        fleet.process.terminate()
        assert fleet.process.wait(120) == 0, fleet.log
        assert not fleet.replicas()
