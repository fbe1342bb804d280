"""A thousand requests of clients that behave badly, against the HTTP process with a scripted engine behind it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil

from tests.e2e.abuse import KINDS, MAX_BODY_BYTES, body, request
from tests.e2e.http_process import HttpProcess, http_process, ready
from tests.e2e.scripted_engine import ScriptedEngine, scripted_engine

NUM_PERMITS = 64
MAX_TOTAL_TOKENS = 10_000
STEP_S = 0.002
MAX_SLOWDOWN = 5
"""How much longer the slowest well-behaved requests may take beside the abuse, on two cores that others use, too."""
SLOWDOWN_GRACE_S = 0.2


class Abused:
    """A server, the engine behind it, and programs that abuse it."""

    def __init__(self, http: HttpProcess, engine: ScriptedEngine, log_path: Path) -> None:
        self.http = http
        self.engine = engine
        self._log_path = log_path

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def abuse(self, num_requests: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.e2e.abuse", str(self.http.port), str(num_requests)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def p99_while(self, condition: Callable[[int], bool]) -> float:
        """Seconds that well-behaved requests take, one after another, as long as `condition` of their number holds."""
        seconds: list[float] = []
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 10}}
        with httpx.Client(base_url=self.http.url, timeout=30) as client:
            while condition(len(seconds)):
                started = time.perf_counter()
                response = client.post("/generate", json=body)
                seconds.append(time.perf_counter() - started)
                assert response.status_code == 200
        return float(np.percentile(seconds, 99))

    def until(self, condition: Callable[[], bool], timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.http.process.status() != psutil.STATUS_ZOMBIE, self.log
            assert time.monotonic() < deadline
            time.sleep(0.05)


@contextlib.contextmanager
def abused_server(model: Path, folder: Path, send_buffer: int | None = None) -> Iterator[Abused]:
    log_path = folder / "log"
    limits = {
        "payload_limit": MAX_BODY_BYTES,
        "max_concurrent_requests": NUM_PERMITS,
        "graceful_termination_timeout_s": 1,
    }
    with http_process(model, log_path, send_buffer=send_buffer, **limits) as http:
        http.endpoint.send(ready(model, max_total_tokens=MAX_TOTAL_TOKENS))
        with scripted_engine(http.endpoint, list(b"hello, world"), STEP_S) as engine:
            abused = Abused(http, engine, log_path)
            abused.until(lambda: "Connected" in abused.log)
            yield abused


def check_abuse(abused: Abused, num_requests: int) -> None:
    process = abused.http.process
    alone_s = abused.p99_while(lambda count: count < 100)
    chat = {"messages": [{"role": "user", "content": "hello"}]}  # the first one starts the process that renders chats
    assert httpx.post(f"{abused.http.url}/chat_tokenize", json=chat, timeout=30).status_code == 200
    num_files, resident = process.num_fds(), process.memory_info().rss
    program = abused.abuse(num_requests)
    beside_s = abused.p99_while(lambda count: program.poll() is None)
    outcomes = json.loads(program.communicate()[0].splitlines()[-1])
    print(json.dumps({"alone_ms": 1000 * alone_s, "beside_ms": 1000 * beside_s, "outcomes": outcomes}))
    grown = process.memory_info().rss - resident
    print(f"resident memory: {resident / 1e6:.0f} MB and {grown / 1e6:.0f} MB more")
    allowed = {kind.__name__: statuses for kind, statuses in KINDS.items()}
    assert sum(sum(counts.values()) for counts in outcomes.values()) == num_requests
    assert not {kind: counts for kind, counts in outcomes.items() if not counts.keys() <= allowed[kind]}
    abused.until(lambda: not abused.engine.num_left)
    abused.until(lambda: process.num_fds() <= num_files)
    assert abused.engine.num_aborted > num_requests / 10
    assert "Traceback" not in abused.log
    assert has_all_permits(abused)
    assert grown < 30e6
    assert beside_s < MAX_SLOWDOWN * alone_s + SLOWDOWN_GRACE_S


def has_all_permits(abused: Abused) -> bool:
    """As many streams as there are permits can be open, and one more is refused."""
    abused.engine.step_s = 0.1
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 9000}}
    with contextlib.ExitStack() as stack:
        limits = httpx.Limits(max_connections=None)
        client = stack.enter_context(httpx.Client(base_url=abused.http.url, limits=limits, timeout=30))
        statuses = [
            stack.enter_context(client.stream("POST", "/generate_stream", json=body)).status_code
            for _ in range(NUM_PERMITS + 1)
        ]
    return statuses == [200] * NUM_PERMITS + [429]


def test_a_thousand_abusive_requests_harm_nobody(tiny_model_dir: Path, tmp_path: Path) -> None:
    with abused_server(tiny_model_dir, tmp_path) as abused:
        check_abuse(abused, 1000)


def test_streams_that_are_hardly_read_cost_little_memory(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Memory is measured at the worst moment, when the tokens of all streams are there."""
    num_readers, num_tokens = 32, 9_000
    with contextlib.ExitStack() as stack:
        abused = stack.enter_context(abused_server(tiny_model_dir, tmp_path, send_buffer=1))
        abused.engine.step_s = 0
        resident = abused.http.process.memory_info().rss
        readers = [stack.enter_context(socket.socket()) for _ in range(num_readers)]
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            reader.connect(("127.0.0.1", abused.http.port))
            reader.sendall(request("/generate_stream", body("/generate_stream", num_tokens)))
        abused.until(lambda: abused.engine.num_requests == num_readers)
        while abused.engine.num_left:
            assert all(reader.recv(1) for reader in readers)
            time.sleep(1)
        grown = abused.http.process.memory_info().rss - resident
        print(f"{grown / 1e6:.0f} MB, {grown / num_readers / num_tokens:.0f} bytes for each token")
        assert grown < 40e6
        for reader in readers:
            reader.close()
        abused.until(lambda: has_all_permits(abused))
