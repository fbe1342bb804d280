"""text-generation-launcher: resolve the flags, bind the port, start the processes, watch them, stop them.

Standard library only. Each child gets its configuration as one JSON line on standard input, and treats the end of that
pipe as the end of the launcher. Exit codes are TGI's (reference `tgi-cli.md` 1.1): 0 after a signal, 1 when something
failed, 2 for a usage error.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from engine.config import PEER_GONE_EXIT_CODE, EngineConfig, engine_environment
from engine.logs import configure_logging
from server.args import ArgumentError, LauncherArgs, is_ip_address, parse_args
from server.config import ServerConfig

logger = logging.getLogger(__name__)

POLL_S = 0.1
GRACEFUL_TERMINATION_TIMEOUT_S = 90
"""How long running requests may take to end after a signal."""
ENGINE_STOP_TIMEOUT_S = 10
DOWNLOAD_STOP_TIMEOUT_S = 10
CAUSE_TIMEOUT_S = 5
"""How long a child may take to end once its peer has noticed that it is ending."""


class LaunchError(Exception):
    """Ends the launcher with exit code 1; the text says what failed and what to do."""


class Stopped(Exception):
    """A signal asked for the end."""


class Signals:
    """SIGTERM, SIGINT and SIGHUP: counted, acted on in the main loop."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP: leave it so
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class Child:
    """One supervised process in a session of its own, so that Ctrl-C reaches only the launcher."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        config: str = "",
        fds: Sequence[int] = (),
        environ: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stdout,
            pass_fds=fds,
            env={**os.environ, **(environ or {})},
            start_new_session=True,
        )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: the main loop will see that
            self.process.stdin.write(config.encode() + b"\n")
            self.process.stdin.flush()

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def describe_end(self) -> str:
        code = self.exit_code
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (the kernel does this when memory runs out)" if -code == signal.SIGKILL else ""
            return f"{self.name} was killed by {name}{hint}"
        return f"{self.name} ended with exit code {code}; its messages are above"

    def stop(self, timeout_s: float, signals: Signals) -> None:
        """SIGTERM, wait, SIGKILL; a further signal to the launcher cuts the wait short."""
        if self.exit_code is None:
            self.process.terminate()
        seen = signals.count
        deadline = time.monotonic() + timeout_s
        while self.exit_code is None and time.monotonic() < deadline and signals.count == seen:
            time.sleep(POLL_S)
        if self.exit_code is None:
            logger.warning("Killing %s", self.name)
            self.process.kill()
            self.process.wait()
        logger.info("%s terminated", self.name)


def main() -> None:
    """Console script."""
    open_standard_streams()
    try:
        args = parse_args(sys.argv[1:])
        configure_logging(args.log_level, "launcher")
        run(args)
    except ArgumentError as error:
        sys.exit(f"Error: {error}")
    except LaunchError as error:
        logger.error("%s", error)
        sys.exit(1)
    except Stopped:
        logger.info("Stopped by a signal")


def open_standard_streams() -> None:
    """Some supervisors close standard input: a socket must not take its number, which means something in a child."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def run(args: LauncherArgs) -> None:
    """Serve until a signal (raises Stopped) or a failure (raises LaunchError)."""
    signals = Signals()
    with bind(args.hostname, args.port) as listener:
        model_path = find_model(args, signals)
        logger.info("Starting webserver and engine for %s on port %d", args.model_id, listener.getsockname()[1])
        processes = start(args, model_path, listener)
    supervise(*processes, signals)


def bind(hostname: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a busy port fails before the weights load."""
    hostname = "127.0.0.1" if hostname == "localhost" else hostname.strip("[]")
    if not is_ip_address(hostname):
        logger.warning("Invalid hostname, defaulting to 0.0.0.0")
        hostname = "0.0.0.0"
    listener = socket.socket(socket.AF_INET6 if ":" in hostname else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((hostname, port))
    except OSError as error:
        listener.close()
        raise LaunchError(f"Cannot listen on {hostname}:{port} ({error.strerror}): give another --port") from error
    return listener


def find_model(args: LauncherArgs, signals: Signals) -> str:
    """The local folder of the model; what is not a folder is fetched from the Hub by a child process."""
    if Path(args.model_id).is_dir() and args.revision is None:
        return args.model_id
    logger.info("Starting check and download process for %s", args.model_id)
    command = [sys.executable, "-m", "engine.cli", "download-weights", args.model_id]
    if args.revision is not None:
        command += ["--revision", args.revision]
    if args.huggingface_hub_cache is not None:
        command += ["--cache-dir", args.huggingface_hub_cache]
    child = Child("download", command, stdout=subprocess.PIPE)
    while child.exit_code is None:
        if signals.count:
            child.stop(DOWNLOAD_STOP_TIMEOUT_S, signals)
            raise Stopped
        time.sleep(POLL_S)
    assert child.process.stdout is not None
    lines = child.process.stdout.read().decode().splitlines()
    if child.exit_code != 0 or not lines:
        raise LaunchError(f"DownloadError: {args.model_id} could not be fetched; the reason is above")
    return lines[-1]


def start(args: LauncherArgs, model_path: str, listener: socket.socket) -> tuple[Child, Child]:
    """Start the engine and the HTTP process with the two ends of a socket pair between them."""
    http_end, engine_end = socket.socketpair()
    with http_end, engine_end:
        num_threads = args.num_threads or available_cores()
        engine_config = EngineConfig(
            model_path=model_path,
            dtype=args.dtype,
            max_input_tokens=args.max_input_tokens,
            max_total_tokens=args.max_total_tokens,
            max_batch_prefill_tokens=args.max_batch_prefill_tokens,
            max_batch_total_tokens=args.max_batch_total_tokens,
            is_prefix_caching=args.is_prefix_caching,
            num_threads=num_threads,
            socket_fd=engine_end.fileno(),
            log_level=args.log_level,
        )
        server_config = ServerConfig(
            model_id=args.model_id,
            model_path=model_path,
            model_sha=snapshot_commit(model_path),
            listen_fd=listener.fileno(),
            engine_fd=http_end.fileno(),
            max_concurrent_requests=args.max_concurrent_requests,
            graceful_termination_timeout_s=GRACEFUL_TERMINATION_TIMEOUT_S,
            compute_type=args.compute_type or "cpu",
            log_level=args.log_level,
        )
        environ = engine_environment(num_threads, dict(os.environ))
        torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        engine = Child(
            "engine rank 0",
            [sys.executable, "-m", "engine"],
            config=engine_config.to_json(),
            fds=[engine_end.fileno()],
            environ={**environ, **torchrun},
        )
        http = Child(
            "webserver",
            [sys.executable, "-m", "server"],
            config=server_config.to_json(),
            fds=[listener.fileno(), http_end.fileno()],
            # glibc gives every thread an arena; after a few huge prompts on the tokenizer's threads they stay large.
            environ={"MALLOC_ARENA_MAX": "2"},
        )
    return http, engine


def supervise(http: Child, engine: Child, signals: Signals) -> None:
    """Watch until a child ends (raises LaunchError) or a signal comes (raises Stopped); then stop the rest."""
    children = (engine, http)
    while not signals.count and all(child.exit_code is None for child in children):
        time.sleep(POLL_S)
    if signals.count:
        logger.info("Terminating webserver; running requests may end")
        http.stop(GRACEFUL_TERMINATION_TIMEOUT_S + CAUSE_TIMEOUT_S, signals)
        engine.stop(ENGINE_STOP_TIMEOUT_S, signals)
        raise Stopped
    cause = find_cause(children)
    for child in (http, engine):
        child.stop(ENGINE_STOP_TIMEOUT_S, signals)
    raise LaunchError(cause.describe_end())


def find_cause(children: Sequence[Child]) -> Child:
    """The child that ended for a reason of its own: not because its peer was gone, which may be noticed earlier."""
    deadline = time.monotonic() + CAUSE_TIMEOUT_S
    while time.monotonic() < deadline:
        for child in children:
            if child.exit_code not in (None, PEER_GONE_EXIT_CODE):
                return child
        time.sleep(POLL_S)
    return next(child for child in children if child.exit_code is not None)


def available_cores() -> int:
    """Cores this process may use: its affinity, cut by the cgroup's quota; never the machine's count."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def snapshot_commit(model_path: str) -> str | None:
    """The commit of a snapshot in the Hub's cache (`.../snapshots/<commit>`), None for any other folder."""
    path = Path(model_path)
    return path.name if path.parent.name == "snapshots" else None


if __name__ == "__main__":
    main()
