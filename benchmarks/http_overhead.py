"""What the HTTP process costs: token events per second on one core, and how long each is on its way.

    python benchmarks/http_overhead.py [--streams 64] [--seconds 10]

The HTTP process is the launcher's own; behind its socket pair this program plays the engine with real frames, one event
for each stream in every step, and a client in a process of its own reads all streams from raw sockets. Where there are
two cores the HTTP process has one to itself. For each route there are two runs: the first is held up by nothing but the
HTTP process (two steps are on their way at a time) and gives the sustained rate; the second sends at half that rate and
gives the added delay, from the engine's send to the client's receive. Token events per second of processor time are
what a core to itself would carry, whatever else the machine does meanwhile. The last line of stdout is JSON.
Needs `make install`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.offline import demo_model  # noqa: E402
from engine.link.messages import EngineStats, FinishReason, GenerationRequest, StepOutput, TokenEvent  # noqa: E402
from tests.e2e.http_process import HttpProcess, http_process, ready  # noqa: E402

ROUTES = ("/generate_stream", "/v1/chat/completions")
STEPS_UNDER_WAY = 2
WARM_UP_STEPS = 50
TEXT = Path(__file__).parent / "texts"
COUNT = struct.Struct("<q")


def body_of(route: str, seed: int, num_tokens: int) -> bytes:
    """A request whose seed is the number of its stream, so that engine and client name it alike."""
    text = "Tell me a story."
    if route == "/generate_stream":
        parameters = {"do_sample": True, "seed": seed, "max_new_tokens": num_tokens}
        return json.dumps({"inputs": text, "parameters": parameters}).encode()
    messages = [{"role": "user", "content": text}]
    return json.dumps({"messages": messages, "stream": True, "seed": seed, "max_tokens": num_tokens}).encode()


class Client:
    """Reads many streams at once; runs in a process of its own."""

    def __init__(self, port: int, route: str, num_streams: int, num_tokens: int, count_path: Path) -> None:
        self._selector = selectors.DefaultSelector()
        self._num_open = num_streams
        self._received: list[list[tuple[float, int]]] = [[] for _ in range(num_streams)]
        """For each stream the moments of `time.monotonic` at which so many events came."""
        with count_path.open("r+b") as file:
            self._count = mmap.mmap(file.fileno(), COUNT.size)
        for index in range(num_streams):
            sock = socket.create_connection(("127.0.0.1", port))
            body = body_of(route, index, num_tokens)
            head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            sock.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
            self._selector.register(sock, selectors.EVENT_READ, index)

    def read(self) -> list[list[tuple[float, int]]]:
        """What has come by the end of all streams. Events end with an empty line, and nothing else has one."""
        num_events = 0
        while self._num_open:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                data = sock.recv(1 << 16)
                now = time.monotonic()
                if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(data.decode())
                num_new = data.count(b"\n\n") - data.count(b"data: [DONE]\n\n")
                num_events += num_new
                COUNT.pack_into(self._count, 0, num_events)
                if num_new:
                    self._received[key.data].append((now, num_new))
                if not data or data.endswith(b"0\r\n\r\n"):
                    self._selector.unregister(sock)
                    sock.close()
                    self._num_open -= 1
        return self._received


def play_engine(
    http: HttpProcess,
    client: subprocess.Popen[bytes],
    count: mmap.mmap,
    num_streams: int,
    token_ids: Sequence[int],
    steps_per_s: float | None,
) -> dict[str, Any]:
    """Send one token of every stream in each step; None: as soon as the client has all but the last steps.

    Returns the moment of each step, and the time and the processor time of the HTTP process after the warm-up.
    """

    def check() -> None:
        assert client.poll() is None and http.process.poll() is None, "the client or the server has ended"

    requests: dict[int, str] = {}
    while len(requests) < num_streams:
        check()
        for message in http.endpoint.receive(1.0):
            if isinstance(message, GenerationRequest):
                assert message.sampling.seed is not None
                requests[message.sampling.seed] = message.request_id
    sent: list[float] = []
    measured = {"started": 0.0, "cpu": 0.0}
    next_step = time.monotonic()
    for step, token_id in enumerate(token_ids):
        if steps_per_s is None:
            while COUNT.unpack_from(count)[0] < (step - STEPS_UNDER_WAY) * num_streams:
                check()
                time.sleep(0.0002)
        else:
            time.sleep(max(0.0, next_step - time.monotonic()))
            next_step += 1 / steps_per_s
        if step == WARM_UP_STEPS:
            measured = {"started": time.monotonic(), "cpu": cpu_seconds(http)}
        reason = FinishReason.LENGTH if step == len(token_ids) - 1 else None
        events = [
            TokenEvent(
                request_id=requests[index],
                token_ids=[token_id],
                logprobs=[-(1 + index + step % 97) / 7],
                finish_reason=reason,
                queue_time_s=0.001 if step == 0 else None,
            )
            for index in range(num_streams)
        ]
        sent.append(time.monotonic())
        http.endpoint.send(StepOutput(events=events, stats=EngineStats()))
    while COUNT.unpack_from(count)[0] < len(token_ids) * num_streams and client.poll() is None:
        http.endpoint.receive(0.001)
    return {
        "sent": sent,
        "seconds": time.monotonic() - measured["started"],
        "cpu_seconds": cpu_seconds(http) - measured["cpu"],
    }


def cpu_seconds(http: HttpProcess) -> float:
    times = http.process.cpu_times()
    return float(times.user + times.system)


def delays_ms(sent: Sequence[float], received: list[list[tuple[float, int]]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Delays of all events after the warm-up, in milliseconds."""
    delays = []
    for stream in received:
        moments = [moment for moment, num_events in stream for _ in range(num_events)]
        assert len(moments) == len(sent), (len(moments), len(sent))
        delays += [1000 * (came - went) for went, came in zip(sent, moments, strict=True)][WARM_UP_STEPS:]
    return np.array(delays)


def run(
    http: HttpProcess, route: str, args: argparse.Namespace, token_ids: Sequence[int], rate: float | None
) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(COUNT.size))
        file.flush()
        options = [str(http.port), route, str(args.streams), str(len(token_ids)), file.name]
        client = subprocess.Popen([sys.executable, __file__, "--client", *options], stdout=subprocess.PIPE)
        with mmap.mmap(file.fileno(), COUNT.size) as count:
            steps_per_s = None if rate is None else rate / args.streams
            played = play_engine(http, client, count, args.streams, token_ids, steps_per_s)
        output, _ = client.communicate(timeout=60)
    delays = delays_ms(played["sent"], json.loads(output))
    return {
        "events_per_s": round(delays.size / played["seconds"]),
        "events_per_cpu_s": round(delays.size / played["cpu_seconds"]),
        "delay_p50_ms": round(float(np.percentile(delays, 50)), 2),
        "delay_p99_ms": round(float(np.percentile(delays, 99)), 2),
    }


@contextlib.contextmanager
def http_on_its_own_core(model: Path) -> Iterator[HttpProcess]:
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        log_path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        http = stack.enter_context(http_process(model, log_path))
        if len(cores) > 1:
            http.process.cpu_affinity(cores[:1])
            os.sched_setaffinity(0, cores[1:])
        http.endpoint.send(ready(model, max_total_tokens=1 << 15))
        while "Connected" not in log_path.read_text():
            if http.process.poll() is not None or http.process.status() == psutil.STATUS_ZOMBIE:
                raise RuntimeError(log_path.read_text())
            time.sleep(0.05)
        yield http


def text_ids(model: Path, num_tokens: int) -> list[int]:
    """Token ids of a real text, over and over."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    text = "\n".join(path.read_text() for path in sorted(TEXT.iterdir()))
    ids: list[int] = tokenizer.encode(text[:20_000], add_special_tokens=False).ids
    return (ids * (num_tokens // len(ids) + 1))[:num_tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10, help="about how long each run takes")
    parser.add_argument("--client", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        port, route, num_streams, num_tokens, count_path = args.client
        print(json.dumps(Client(int(port), route, int(num_streams), int(num_tokens), Path(count_path)).read()))
        return
    model = Path(demo_model())
    result: dict[str, Any] = {"streams": args.streams}
    with http_on_its_own_core(model) as http:
        for route in ROUTES:
            num_steps = WARM_UP_STEPS + int(args.seconds * 5000 / args.streams)
            sustained = run(http, route, args, text_ids(model, num_steps), None)
            print(f"{route}, sustained: {sustained}", flush=True)
            half_rate = sustained["events_per_s"] / 2
            num_steps = WARM_UP_STEPS + int(args.seconds * half_rate / args.streams)
            half = run(http, route, args, text_ids(model, num_steps), half_rate)
            print(f"{route}, at half that rate: {half}", flush=True)
            result[route] = {"sustained": sustained, "half": half}
        result["resident_mb"] = round(http.process.memory_info().rss / 1e6)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
