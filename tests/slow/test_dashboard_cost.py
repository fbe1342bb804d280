"""Ten open dashboards: the processor time that they take from the HTTP process, and so from the streams of others."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.http_overhead import http_on_its_own_core, run, text_ids
from engine.link.messages import EngineStats, StepOutput
from tests.e2e.conftest import build_demo_model
from tests.e2e.http_process import HttpProcess

NUM_DASHBOARDS = 10
NUM_STREAMS = 8
STEPS_PER_S = 10
"""Few enough that the process has time to spare: what others do on the machine changes the time of a token by a tenth,
and a full core of tokens would hide a hundredth of a core."""
PAIRS = 5
SECONDS = 12
MAX_SHARE_OF_A_CORE = 0.01


@pytest.fixture(scope="module")
def http() -> Iterator[HttpProcess]:
    """The HTTP process alone on a core; the other end of its socket pair plays the engine."""
    cores = os.sched_getaffinity(0)
    try:
        with http_on_its_own_core(build_demo_model("--small")) as http:
            yield http
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def open_dashboards(http: HttpProcess, count: int) -> Iterator[None]:
    """So many dashboards for the length of the block. Each has got its lines by the end, on a busy host fewer."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", http.port))) for _ in range(count)]
        for sock in socks:
            sock.sendall(b"GET /dashboard/events HTTP/1.1\r\nhost: x\r\n\r\n")
        yield
        num_lines = (time.monotonic() - started) / 2 - 1
        for sock in socks:
            assert sock.recv(1 << 20).count(b"data: ") >= num_lines


def loop_seconds(http: HttpProcess) -> float:
    """Processor time of the main thread, which the event loop runs in; exact, where a clock's ticks are not."""
    return int(Path(f"/proc/{http.process.pid}/schedstat").read_text().split()[0]) / 1e9


def share_with_streams(http: HttpProcess, num_dashboards: int) -> float:
    """Part of a core that the process takes while it streams."""
    token_ids = text_ids(build_demo_model("--small"), SECONDS * STEPS_PER_S)
    with open_dashboards(http, num_dashboards):
        before, started = loop_seconds(http), time.monotonic()
        run(http, "/generate_stream", argparse.Namespace(streams=NUM_STREAMS), token_ids, NUM_STREAMS * STEPS_PER_S)
        return (loop_seconds(http) - before) / (time.monotonic() - started)


def idle_share(http: HttpProcess, num_dashboards: int) -> float:
    """Part of a core that the process takes while nothing is asked of it and the engine says that it is there."""
    with open_dashboards(http, num_dashboards):
        before = loop_seconds(http)
        for _ in range(SECONDS):
            http.endpoint.send(StepOutput(events=[], stats=EngineStats()))
            time.sleep(1)
        return (loop_seconds(http) - before) / SECONDS


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", [idle_share, share_with_streams], ids=["idle", "streams"])
def test_they_take_less_than_a_hundredth_of_a_core(
    http: HttpProcess, share: Callable[[HttpProcess, int], float]
) -> None:
    """So a process whose whole core goes to streams has more than 0.99 of it left for them."""
    shares = [(share(http, 0), share(http, NUM_DASHBOARDS)) for _ in range(PAIRS)]
    print(f"parts of a core without and with {NUM_DASHBOARDS} dashboards: {shares}")
    assert statistics.median(watched - alone for alone, watched in shares) < MAX_SHARE_OF_A_CORE, shares
