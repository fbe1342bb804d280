"""Many connections and few descriptors: idle ones give way, refusals have words, serving goes on."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.e2e.canary import Canary
from tests.e2e.http_process import HttpProcess, http_process, ready
from tests.e2e.mutations import whole
from tests.e2e.scripted_engine import scripted_engine
from tests.e2e.test_abuse import Abused

STREAM = b'{"inputs":"hello","parameters":{"max_new_tokens":9000}}'


@contextlib.contextmanager
def few_descriptors(model: Path, folder: Path, number: int) -> Iterator[HttpProcess]:
    log_path = folder / "log"
    limits = {"max_concurrent_requests": 1000, "graceful_termination_timeout_s": 1}
    with http_process(model, log_path, max_descriptors=number, **limits) as http:
        http.endpoint.send(ready(model, max_total_tokens=10_000))
        with scripted_engine(http.endpoint, list(b"hello"), 0.05) as engine:
            abused = Abused(http, engine, log_path)
            abused.until(lambda: "Connected" in abused.log)
            yield http
            assert "Traceback" not in abused.log and "out of system resource" not in abused.log


def is_served(http: HttpProcess, **parameters: object) -> bool:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 2, **parameters}}
    return httpx.post(f"{http.url}/generate", json=body, timeout=30).status_code == 200


@contextlib.contextmanager
def connections(http: HttpProcess, number: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", http.port))) for _ in range(number)]


def status_of(stream: socket.socket) -> str:
    """The status of the answer, or "none": refusals beyond those that are waited for may be lost to a reset."""
    try:
        return stream.recv(1 << 16).split()[1].decode()
    except (ConnectionError, IndexError):
        return "none"


def test_idle_connections_give_way_to_requests(tiny_model_dir: Path, tmp_path: Path) -> None:
    with few_descriptors(tiny_model_dir, tmp_path, 256) as http, Canary(http.port) as canary:
        with connections(http, 400):
            assert all(is_served(http) for _ in range(5))
            assert http.process.num_fds() < 256 - 32
        assert canary.num_lost == 0


def test_beyond_the_limit_of_descriptors_refusals_have_words(tiny_model_dir: Path, tmp_path: Path) -> None:
    with few_descriptors(tiny_model_dir, tmp_path, 256) as http, Canary(http.port) as canary:
        with connections(http, 220) as streams:
            for stream in streams:
                stream.sendall(whole("/generate_stream", STREAM))
            statuses = {status_of(stream) for stream in streams}
            refusal = httpx.post(f"{http.url}/generate", json={"inputs": "hello"}, timeout=30)
            assert (refusal.status_code, refusal.text) == (503, "Too many connections")
        assert {"200", "503"} <= statuses <= {"200", "503", "none"}
        assert canary.num_lost == 0
        time.sleep(1)  # the connections that were closed are noticed
        assert is_served(http)


def test_requests_are_served_beside_1500_idle_connections(small_demo_model: Path, tmp_path: Path) -> None:
    """A long text and a grammar need processes, whose pipes have descriptors beyond 1,023."""
    with few_descriptors(small_demo_model, tmp_path, 4096) as http, connections(http, 1500):
        assert is_served(http)
        assert is_served(http, grammar={"type": "regex", "value": "[a-z]+"})
        response = httpx.post(f"{http.url}/tokenize", json={"inputs": "hello " * 50_000}, timeout=60)
        assert (response.status_code, len(response.json())) == (200, 50_001)
