"""Servers in turns: 16 streams over HTTP, 256 tokens in and 128 out, in 16 bits."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from benchmarks.peers.load import Load, closed_loop, percentile
from benchmarks.peers.rounds import take_turns
from benchmarks.peers.table import OFFLINE, vllm_variables
from benchmarks.peers.works import OURS, Row
from tests.e2e.launched import free_port

NUM_STREAMS, NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 16, 24, 256, 128
START_TIMEOUT_S = 900.0
"""vLLM compiles when it starts for the first time."""
END_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Server:
    """How a server is started, behind the Python of its environment and before the folder and the port."""

    arguments: Sequence[str]
    variables: Callable[[Path], Mapping[str, str]]


def served_by_vllm(environment: Path) -> dict[str, str]:
    """As in the other rows, but its engine has a process of its own, for which it chooses OpenMP's library itself."""
    variables = vllm_variables(environment)
    return {name: variables[name] for name in variables if name.startswith("VLLM_CPU_")}


SERVERS = {
    OURS: Server(["-m", "pytgi", "serve", "--dtype", "bfloat16", "--model-id"], lambda environment: {}),
    "vLLM": Server(
        ["-m", "vllm.entrypoints.openai.api_server", "--served-model-name", "demo", "--dtype", "bfloat16"]
        + ["--max-model-len", "4096", "--model"],
        served_by_vllm,
    ),
}
FIGURES: dict[str, tuple[Callable[[Load], float], float, bool]] = {
    "tokens/s": (lambda load: load.num_tokens / load.seconds, 1.4, False),
    "first token, p50, s": (lambda load: percentile(load.first_s, 50), 0.5, True),
    "between tokens, p99, s": (lambda load: percentile(load.gaps_s, 99), 1.0, True),
}
"""Name of a row -> its figure, the ratio that passes, whether it is a time."""


@contextlib.contextmanager
def started(name: str, python: str, folder: str) -> Iterator[str]:
    """A server's URL. Raises RuntimeError if it does not get ready."""
    server, port = SERVERS[name], free_port()
    environ = {**os.environ, **OFFLINE, **server.variables(Path(python).parents[1])}
    command = [python, *server.arguments, folder, "--port", str(port)]
    process = subprocess.Popen(command, env=environ, stdout=sys.stderr, start_new_session=True)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(1.0)
    raise RuntimeError("the server ended" if process.poll() is not None else "the server does not get ready")


def prompt_groups(ids: Sequence[int], folder: str) -> Iterator[list[str]]:
    """The prompts of one round after the other, each a part of the text that the rounds before had not."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    firsts = itertools.cycle(range(0, len(ids) - PROMPT_TOKENS, PROMPT_TOKENS))
    parts = (list(ids[first : first + PROMPT_TOKENS]) for first in firsts)
    while True:
        yield [tokenizer.decode(part) for part in itertools.islice(parts, NUM_REQUESTS)]


def served_rows(
    urls: Mapping[str, str], ids: Sequence[int], folder: str, args: argparse.Namespace
) -> tuple[list[Row], dict[str, str]]:
    """A row for each of `FIGURES`, medians of the rounds, and why a server has none."""

    def turn(url: str, groups: Iterator[list[str]]) -> Load:
        return closed_loop(url, next(groups), NUM_STREAMS, NEW_TOKENS)

    turns = {name: functools.partial(turn, url, prompt_groups(ids, folder)) for name, url in urls.items()}
    loads, failures = take_turns(turns, args.rounds, args.max_load)
    rows = []
    for label, (figure, ratio, is_time) in FIGURES.items() if OURS in loads else ():
        rates = {name: round(statistics.median(map(figure, taken)), 3) for name, taken in loads.items()}
        rows.append(Row("16-bit", f"HTTP, {NUM_STREAMS} streams: {label}", rates, ratio, is_time))
    return rows, failures
