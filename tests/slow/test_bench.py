"""The benchmark's numbers beside those of a load script of ten lines, on our server, llama.cpp's and vLLM's.

Servers need cores for themselves. One that keeps time by the clock shows anywhere that the comparison finds faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.servers import SERVERS, started
from server.bench.command import main
from server.bench.records import Record
from server.bench.trace import Lengths, Plan, Shape, make_trace
from server.bench.wires import WIRES, Body, Event
from tests.e2e.conftest import build_demo_model

NUM_STREAMS, NUM_REQUESTS = 4, 12
PROMPT, OUTPUT = "64", "uniform:16:32"
TOLERANCE = 0.05
PRECISION = 0.01
"""Standard error of a ratio at which there are rounds enough."""
MIN_ROUNDS, MAX_S = 8, 600.0

Figures = tuple[float, float, float]
"""Tokens per second, and medians of the time to the first token and of the time between two, in seconds."""
METRICS = ("throughput", "first token", "between tokens")


def load_script(url: str, number: int) -> Figures:
    """The independent script: closed loop, streamed completions, nothing of the benchmark but its prompts."""
    firsts: list[float] = []
    gaps: list[float] = []
    port = url.rpartition(":")[2]
    prompts, seconds = iter(plans := prompts_of(number)), -time.perf_counter()

    async def stream() -> None:
        for plan in prompts:
            body = {"model": "demo", "prompt": plan.prompt, "max_tokens": plan.max_new_tokens, "temperature": 0}
            data = json.dumps({**body, "ignore_eos": True, "stream": True}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json"
            writer.write(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            last = sent = time.perf_counter()
            while line := await reader.readline():
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["text"]:
                    (gaps if last > sent else firsts).append(time.perf_counter() - last)
                    last = time.perf_counter()
            writer.close()

    async def load() -> None:
        await asyncio.gather(*(stream() for _ in range(NUM_STREAMS)))

    asyncio.run(load())
    seconds += time.perf_counter()
    num_tokens = sum(plan.max_new_tokens for plan in plans)
    return num_tokens / seconds, statistics.median(firsts), statistics.median(gaps)


def prompts_of(number: int) -> Sequence[Plan]:
    """The benchmark's own of a round with their words the other way round, so that no prefix cache knows them."""
    shape = Shape(Lengths.parse(PROMPT), Lengths.parse(OUTPUT))
    plans = make_trace(shape, NUM_REQUESTS, None, f"{number} {NUM_STREAMS} at a time 0", None)
    return [Plan(0.0, " ".join(reversed(plan.prompt.split())), plan.max_new_tokens) for plan in plans]


def benchmark(url: str, number: int, report: Path) -> Figures:
    flags = f"-b {NUM_STREAMS} -w 0 -s {PROMPT} -d {OUTPUT} --num-requests {NUM_REQUESTS} --seed {number}"
    assert main(["--url", url, *flags.split(), "--wire", "completions", "-o", str(report)], environ={}) == 0
    (level,) = json.loads(report.read_text())["levels"]
    assert level["num_completed"] == NUM_REQUESTS
    times = {key: by["p50"]["value"] for key, by in level["latencies"].items()}
    return level["output_tokens_per_s"], times["ttft"], times["inter_token"]


def ratios_to_script(url: str, folder: Path) -> dict[str, float]:
    """What the benchmark measures over what the script does: medians of rounds in turns, as many as the noise demands.

    Who is first in a round is second in the next. The number of rounds depends on how the ratios spread, never on what
    they are.
    """
    logs: dict[str, list[float]] = {metric: [] for metric in METRICS}
    until = time.monotonic() + MAX_S
    for number in itertools.count():
        arms: dict[str, Callable[[], Figures]] = {
            "script": functools.partial(load_script, url, number),
            "benchmark": functools.partial(benchmark, url, number, folder / "report.json"),
        }
        figures = {name: arms[name]() for name in sorted(arms, reverse=bool(number % 2))}
        if number == 0:
            continue  # It warms up.
        for metric, by_benchmark, by_script in zip(METRICS, figures["benchmark"], figures["script"], strict=True):
            logs[metric].append(math.log(by_benchmark / by_script))
        if number >= MIN_ROUNDS and (is_precise(logs.values()) or time.monotonic() > until):
            break
    print(number, logs)
    return {metric: math.exp(statistics.median(values)) for metric, values in logs.items()}


def is_precise(logs: Iterable[Sequence[float]]) -> bool:
    return all(statistics.stdev(values) < PRECISION * math.sqrt(len(values)) for values in logs)


def is_the_same(ratio: float) -> bool:
    return abs(ratio - 1) <= TOLERANCE


FIRST_S, GAP_S = 0.12, 0.03


async def answer_at_a_pace(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The list of models, or a completion whose tokens come by the clock, whatever else the machine does."""
    head = await reader.readuntil(b"\r\n\r\n")
    body = await reader.readexactly(int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]))
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    if head.startswith(b"GET"):
        writer.write(b'{"data": [{"id": "paced"}]}')
    else:
        num_tokens = json.loads(body)["max_tokens"]
        events: list[dict[str, Any]] = [{"choices": [{"text": "a"}]}] * num_tokens
        events[-1] = {**events[-1], "usage": {"prompt_tokens": 1, "completion_tokens": num_tokens}}
        due = time.perf_counter() + FIRST_S
        for event in events:
            await asyncio.sleep(due - time.perf_counter())
            writer.write(f"data: {json.dumps(event)}\n\n".encode())
            due += GAP_S
        writer.write(b"data: [DONE]\n\n")
    writer.close()


@contextlib.contextmanager
def paced_server() -> Iterator[str]:
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(answer_at_a_pace, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(server.wait_closed())
        loop.close()


def test_the_numbers_are_those_of_a_load_script_on_a_server_that_keeps_time(tmp_path: Path) -> None:
    with paced_server() as url:
        ratios = ratios_to_script(url, tmp_path)
    assert all(map(is_the_same, ratios.values())), ratios


def test_a_benchmark_that_counts_otherwise_has_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second token is taken for the first, times are those of two tokens, and two tokens too many count."""
    wire = WIRES["completions"]

    def miscounted(data: Body) -> Event:
        event = wire.event(data)
        return dataclasses.replace(event, usage=event.usage and (event.usage[0], event.usage[1] + 2))

    second_token = property(lambda record: record.token_times[1] - record.started)
    two_tokens = property(
        lambda record: [b - a for a, b in zip(record.token_times, record.token_times[2:], strict=False)]
    )
    monkeypatch.setitem(WIRES, "completions", dataclasses.replace(wire, event=miscounted))
    monkeypatch.setattr(Record, "time_to_first_token_s", second_token)
    monkeypatch.setattr(Record, "gaps_s", two_tokens)
    with paced_server() as url:
        ratios = ratios_to_script(url, tmp_path)
    assert not any(map(is_the_same, ratios.values())), ratios


@pytest.mark.parametrize("name", list(SERVERS))
def test_the_numbers_are_those_of_a_load_script(name: str, tmp_path: Path) -> None:
    with started(name, str(build_demo_model())) as url:
        ratios = ratios_to_script(url, tmp_path)
    assert all(map(is_the_same, ratios.values())), ratios
