"""The HTTP process by itself, as the launcher starts it; the other end of its socket pair is the caller's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from engine.link.ipc import EngineEndpoint
from engine.link.messages import EngineReady
from server.config import ServerConfig
from server.launcher.start import WEBSERVER_ENVIRON

STOP_TIMEOUT_S = 20.0


@dataclasses.dataclass
class HttpProcess:
    """A running `python -m server`; it listens once the engine has said that it is ready, or early."""

    process: psutil.Popen
    port: int
    endpoint: EngineEndpoint

    def tell(self, **fields: Any) -> None:
        """Send a line as the launcher does."""
        self.process.stdin.write(json.dumps(fields).encode() + b"\n")
        self.process.stdin.flush()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def http_process(
    model: Path | str,
    log_path: Path,
    *,
    port: int = 0,
    send_buffer: int | None = None,
    max_descriptors: int | None = None,
    **config: Any,
) -> Iterator[HttpProcess]:
    """`model` is empty: the caller will tell. `config`: more fields of ServerConfig; `port`: 0 is a free one;
    `send_buffer`: what the kernel keeps for a client that does not read, in bytes; `max_descriptors`: `ulimit -n` of
    the process. At the end of the block the process is gone.
    """
    ours, theirs = socket.socketpair()
    with socket.socket() as listener, theirs, log_path.open("wb") as log:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        fds: dict[str, Any] = {"listen_fd": listener.fileno(), "engine_fd": theirs.fileno()}
        settings = ServerConfig(**{"model_id": "org/model", "model_path": str(model), **fds, **config})
        process = psutil.Popen(
            [sys.executable, "-P", "-m", "server"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=tuple(fds.values()),
            env={**os.environ, **WEBSERVER_ENVIRON},
            preexec_fn=None if max_descriptors is None else functools.partial(_limit_descriptors, max_descriptors),
        )
        process.stdin.write(settings.to_json().encode() + b"\n")
        process.stdin.flush()
        port = listener.getsockname()[1]
    try:
        yield HttpProcess(process, port, EngineEndpoint(ours))
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdin.close()
            ours.close()


def _limit_descriptors(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


def ready(model: Path, *, max_total_tokens: int) -> EngineReady:
    """The message by which an engine with a window of so many tokens says that it is ready."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    return EngineReady(
        max_input_tokens=max_total_tokens - 1,
        max_total_tokens=max_total_tokens,
        max_batch_prefill_tokens=4096,
        max_batch_total_tokens=1 << 20,
        vocab_size=vocab_size,
    )
