"""Ten open dashboards: what they cost the HTTP process by itself, and the streams of others."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.http_overhead import http_on_its_own_core, run, text_ids
from engine.link.messages import EngineStats, StepOutput
from tests.e2e.conftest import build_demo_model
from tests.e2e.http_process import HttpProcess

NUM_DASHBOARDS = 10
NUM_STREAMS = 64
NUM_STEPS = 800
"""Steps of a round, in each of which every stream gets a token: some two seconds of a core."""
ROUNDS = 15
IDLE_S = 20
MAX_SLOWDOWN = 1.01
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


def seconds_of_round(http: HttpProcess, num_dashboards: int, token_ids: list[int]) -> float:
    """Processor time that the process, which has as much to do as it can do, takes for the streams of a round."""
    before = loop_seconds(http)
    with open_dashboards(http, num_dashboards):
        run(http, "/generate_stream", argparse.Namespace(streams=NUM_STREAMS), token_ids, None)
        return loop_seconds(http) - before


@pytest.mark.timeout(1800)
def test_streams_of_others_slow_by_less_than_a_hundredth(http: HttpProcess) -> None:
    """Where the HTTP process is what limits the streams, they slow as its time for them grows."""
    token_ids = text_ids(build_demo_model("--small"), NUM_STEPS)
    ratios = []
    for turn in range(ROUNDS):
        order = (0, NUM_DASHBOARDS) if turn % 2 else (NUM_DASHBOARDS, 0)
        seconds = {count: seconds_of_round(http, count, token_ids) for count in order}
        ratios.append(seconds[NUM_DASHBOARDS] / seconds[0])
    slowdown = statistics.median(ratios)
    print(f"{NUM_DASHBOARDS} dashboards: {slowdown:.4f} times the time for the same tokens, {sorted(ratios)}")
    assert slowdown < MAX_SLOWDOWN, sorted(ratios)


def idle_share(http: HttpProcess, num_dashboards: int) -> float:
    """Part of a core that the process takes while nothing is asked of it and the engine says that it is there."""
    with open_dashboards(http, num_dashboards):
        before = loop_seconds(http)
        for _ in range(IDLE_S):
            http.endpoint.send(StepOutput(events=[], stats=EngineStats()))
            time.sleep(1)
        return (loop_seconds(http) - before) / IDLE_S


@pytest.mark.timeout(300)
def test_they_take_less_than_a_hundredth_of_a_core(http: HttpProcess) -> None:
    shares = {count: idle_share(http, count) for count in (0, NUM_DASHBOARDS)}
    print(f"part of a core by the number of dashboards: {shares}")
    assert shares[NUM_DASHBOARDS] - shares[0] < MAX_SHARE_OF_A_CORE
