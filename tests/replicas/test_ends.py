"""The front's end while much goes on: nothing of it stays, and nobody waits for what is gone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import build_demo_model
from tests.replicas.conftest import FLAGS, Fleet, running_fleet

pytestmark = pytest.mark.timeout(600)

NUM_STREAMS = 8
START_TIMEOUT_S = 60


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Replicas for the test to end."""
    model = tmp_path / "a model"
    model.symlink_to(build_demo_model("--small"))
    with running_fleet(model, tmp_path, *FLAGS) as fleet:
        yield fleet


@contextlib.contextmanager
def running_streams(fleet: Fleet, max_new_tokens: int) -> Iterator[list[Future[str]]]:
    """Streams that have all begun. Each gives its last event, or the name of what broke it off."""
    begun = [threading.Event() for _ in range(NUM_STREAMS)]
    body = {"inputs": "A story:", "parameters": {"max_new_tokens": max_new_tokens, "ignore_eos": True}}

    def last_event(has_begun: threading.Event) -> str:
        last = ""
        try:
            with httpx.stream("POST", f"{fleet.url}/generate_stream", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    last = line or last
                    has_begun.set()
        except httpx.TransportError as error:
            return type(error).__name__
        return last

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(last_event, event) for event in begun]
        assert all(event.wait(START_TIMEOUT_S) for event in begun)
        yield streams


def test_sigterm_in_the_middle_of_an_update_lets_streams_end_and_leaves_nothing(fleet: Fleet) -> None:
    before = set(fleet.replicas())
    command = [sys.executable, "-P", "-m", "pytgi", "serve", str(fleet.model), "--replicas", "2", "--deploy-only"]
    environ = {**os.environ, "PYTHONPATH": os.getcwd(), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": fleet.ray_address}
    with subprocess.Popen(
        [*command, "--replica-host", "127.0.0.1", *FLAGS, "--max-best-of", "3"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as update:
        while set(fleet.replicas()) <= before:  # until one of the new ones loads
            assert update.poll() is None
            time.sleep(0.05)
        with running_streams(fleet, 60) as streams:
            fleet.process.terminate()
            assert fleet.process.wait(120) == 0, fleet.log
            assert all('"generated_text":"' in stream.result() for stream in streams)
        assert not fleet.replicas()
        words, _ = update.communicate(timeout=120)
    assert update.returncode == 1
    # Ray hands on tracebacks of the replicas that it stops, behind marks of their own.
    assert "ERROR front: " in words and "\nTraceback" not in words, words


def test_engines_and_streams_end_with_a_front_that_is_killed(fleet: Fleet) -> None:
    processes = [process for actor in fleet.replicas().values() for process in (actor, *actor.children(recursive=True))]
    assert len(processes) >= 2 * len(("actor", "launcher", "server", "engine"))
    with running_streams(fleet, 1500) as streams:
        fleet.process.kill()
        assert all("Error" in stream.result() for stream in streams)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
