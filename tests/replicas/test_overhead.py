"""What the front adds to each token: streams through it and past it, in turns."""

from __future__ import annotations

import http.client
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.e2e.launched import free_port

NUM_TOKENS = 200
STEP_S = 0.005
ROUNDS = 10
MAX_OVERHEAD_MS = 0.2


class Ticker(BaseHTTPRequestHandler):
    """Streams events of the size of a token's, each with the time when it left."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for _ in range(NUM_TOKENS):
            time.sleep(STEP_S)
            event = b"data: %-160d\n\n" % time.perf_counter_ns()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    """A server that streams, and a front before it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ticker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port, direct = free_port(), server.server_address[1]
    front = subprocess.Popen([sys.executable, "-m", "tests.replicas.fixed_front", str(port), f"127.0.0.1:{direct}"])
    try:
        wait_for_listener(port)
        yield direct, port
    finally:
        front.kill()
        front.wait()
        server.shutdown()
        server.server_close()


def wait_for_listener(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionError:
            assert time.monotonic() < deadline, "the front does not listen"
            time.sleep(0.1)


def delays_ms(port: int) -> list[float]:
    """The time of each token from the server to here."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/generate_stream", b'{"inputs": "x"}', {"content-type": "application/json"})
    answer = connection.getresponse()
    delays = []
    while line := answer.readline():
        if line.startswith(b"data:"):
            delays.append((time.perf_counter_ns() - int(line[5:])) / 1e6)
    connection.close()
    assert len(delays) == NUM_TOKENS
    return delays


def test_the_front_adds_less_than_a_fifth_of_a_millisecond_to_a_token(ports: tuple[int, int]) -> None:
    differences = []
    for turn in range(ROUNDS):
        order = ports if turn % 2 else ports[::-1]
        medians = {port: statistics.median(delays_ms(port)) for port in order}
        differences.append(medians[ports[1]] - medians[ports[0]])
    overhead = statistics.median(differences)
    print(f"the front adds {overhead:.3f} ms to a token, medians of {NUM_TOKENS} tokens and {ROUNDS} rounds")
    assert overhead < MAX_OVERHEAD_MS, sorted(differences)
