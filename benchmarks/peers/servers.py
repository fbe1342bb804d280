"""The servers that are compared over HTTP: how each one is started, in 16 bits, and when it is ready."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from benchmarks.offline import num_cores
from benchmarks.peers.llama_server import llama_server
from benchmarks.peers.table import OFFLINE, PEERS, converted, python_of, short_spin, vllm_variables
from benchmarks.peers.works import OURS
from tests.e2e.launched import free_port

NUM_STREAMS, CONTEXT_TOKENS = 16, 4096
"""Streams at a time, and tokens that one of them may have."""
START_TIMEOUT_S = 900.0
"""vLLM compiles when it starts for the first time."""
END_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Server:
    """What serves a folder's model on the port that follows `command`."""

    command: Callable[[Path], Sequence[str]]
    variables: Callable[[], Mapping[str, str]] = dict
    flags: str = ""
    """What it runs with, for the table."""


def _ours(folder: Path) -> list[str]:
    return [sys.executable, "-m", "pytgi", "serve", str(folder), "--dtype", "bfloat16"]


def _vllm(folder: Path) -> list[str]:
    program = [python_of(PEERS["vLLM"], "native"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    limits = ["--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", str(NUM_STREAMS)]
    return [*program, "--served-model-name", "demo", "--dtype", "bfloat16", "--enable-prefix-caching", *limits]


def _vllm_variables() -> dict[str, str]:
    """As in the other rows, but its engine has a process of its own, for which it chooses OpenMP's library itself."""
    variables = vllm_variables(Path(python_of(PEERS["vLLM"], "native")).parents[1])
    return {name: variables[name] for name in variables if name.startswith("VLLM_CPU_")}


def _llama(folder: Path) -> list[str]:
    peer = PEERS["llama.cpp"]
    model = converted(peer, folder, peer.forms["16-bit"], python_of(peer, "native"))
    threads, sizes = str(num_cores()), ["--parallel", str(NUM_STREAMS), "--ctx-size", str(NUM_STREAMS * CONTEXT_TOKENS)]
    return [str(llama_server()), "--model", str(model), *sizes, "--threads", threads, "--flash-attn", "on"]


SERVERS = {
    OURS: Server(_ours),
    "vLLM": Server(
        _vllm,
        _vllm_variables,
        f"its OpenAI server, VLLM_CPU_KVCACHE_SPACE=1, prefix cache, {NUM_STREAMS} sequences of {CONTEXT_TOKENS:,}",
    ),
    "llama.cpp": Server(
        _llama,
        lambda: short_spin(Path()),
        f"llama-server built with GGML_NATIVE; {NUM_STREAMS} slots of {CONTEXT_TOKENS:,}, flash attention, short spin",
    ),
}


@contextlib.contextmanager
def started(name: str, folder: str) -> Iterator[str]:
    """A server's URL. Raises RuntimeError if it does not get ready."""
    server, port = SERVERS[name], free_port()
    environ = {**os.environ, **OFFLINE, **server.variables()}
    command = [*server.command(Path(folder)), "--port", str(port)]
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
