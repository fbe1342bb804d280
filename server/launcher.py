"""text-generation-launcher: resolve the flags, bind the port, start the processes, watch them, stop them.

Standard library only. Each child gets its configuration as one JSON line on standard input, and treats the end of that
pipe as the end of the launcher. Exit codes are TGI's (reference `tgi-cli.md` 1.1): 0 after a signal, 1 when something
failed, 2 for a usage error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from engine.config import (
    ENGINE_HUNG_EXIT_CODE,
    PEER_GONE_EXIT_CODE,
    START_FAILED_EXIT_CODE,
    EngineConfig,
    engine_environment,
)
from engine.errors import StartError
from engine.logs import configure_logging
from server.args import ArgumentError, LauncherArgs, parse_args
from server.config import ServerConfig
from server.runtime import available_cores, describe_runtime, is_ip_address

logger = logging.getLogger("launcher")

PYTHON = (sys.executable, "-P", "-m")
"""-P: a folder `server` or `engine` where the launcher was started is somebody else's code."""
POLL_S = 0.1
SAME_MOMENT_S = 0.5
STOPPED_S = 25.0
"""More than the webserver takes to notice a silent engine, as it can still tell its clients."""
ENGINE_NAME = "engine rank 0"
LAST_EVENTS_TIMEOUT_S = 5
"""How long the webserver may take, once its drain is over, to end the streams that are left."""
STOP_TIMEOUT_S = 5
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
        self._last_time = -math.inf
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup ignores SIGHUP: leave it so
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A closing terminal or a service manager sends two kinds at once, which is no second thought.
        now = time.monotonic()
        if now - self._last_time > SAME_MOMENT_S:
            self.count += 1
            self._last_time = now


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

    @property
    def is_stopped(self) -> bool:
        """Whether somebody has sent it SIGSTOP."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def describe_end(self) -> str:
        code = self.exit_code
        if code == ENGINE_HUNG_EXIT_CODE:
            return f"{ENGINE_NAME} hangs and was killed; what it did last is above"
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (the kernel does this when memory runs out)" if -code == signal.SIGKILL else ""
            return f"{self.name} was killed by {name}{hint}"
        return f"{self.name} ended with exit code {code}; its messages are above"

    def stop(self, timeout_s: float, is_cut_short: Callable[[], bool]) -> None:
        """SIGTERM, wait, SIGKILL; no more waiting once `is_cut_short`."""
        if self.exit_code is None:
            self.process.terminate()
        deadline = time.monotonic() + timeout_s
        while self.exit_code is None and time.monotonic() < deadline and not is_cut_short():
            time.sleep(POLL_S)
        is_killed = self.exit_code is None
        if is_killed:
            self.process.kill()
            self.process.wait()
        logger.info("%s %s", self.name, "killed" if is_killed else "terminated")


def main() -> None:
    """Console script."""
    open_standard_streams()
    try:
        args = parse_args(sys.argv[1:])
        configure_logging(args.log_level, "launcher", is_json=args.json_output)
        run(args)
    except ArgumentError as error:
        sys.exit(f"Error: {error}")
    except (LaunchError, StartError) as error:
        logger.error("%s", error)
        sys.exit(1)
    except Stopped:
        logger.info("Stopped by a signal")
    except Exception:
        logger.exception("The launcher failed")
        sys.exit(1)


def open_standard_streams() -> None:
    """Some supervisors close them: no socket may take a number that means something in a child, or in a library."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def run(args: LauncherArgs) -> None:
    """Serve until a signal (raises Stopped) or a failure (raises LaunchError)."""
    signals = Signals()
    if args.env:
        logger.info("Runtime environment:\n%s", describe_runtime())
    logger.info("Args: %s", args.echo)
    for warning in args.warnings:
        logger.warning("%s", warning)
    with bind(args.hostname, args.port) as listener:
        model_path = find_model(args, signals)
        logger.info("Starting shard")
        logger.info("Starting Webserver for %s on port %d", args.model_id, listener.getsockname()[1])
        processes = start(args, model_path, listener)
    supervise(*processes, signals, args.graceful_termination_timeout)


def bind(hostname: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a busy port fails before the weights load."""
    hostname = "127.0.0.1" if hostname == "localhost" else hostname.strip("[]")
    if not is_ip_address(hostname):
        logger.warning("Invalid hostname, defaulting to 0.0.0.0")
        hostname = "0.0.0.0"
    with contextlib.ExitStack() as stack:
        try:
            family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((hostname, port))
        except OSError as error:
            flag = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--hostname"
            raise LaunchError(f"Cannot listen on {hostname}:{port} ({error.strerror}): give another {flag}") from error
        stack.pop_all()
        return listener


def find_model(args: LauncherArgs, signals: Signals) -> str:
    """The local folder of the model; what is not a folder is fetched from the Hub by a child process."""
    if os.path.isdir(args.model_id) and args.revision is None:
        return args.model_id
    logger.info("Starting check and download process for %s", args.model_id)
    command = [*PYTHON, "engine.cli", "download-weights", "--lifeline"]
    if args.revision is not None:
        command.append(f"--revision={args.revision}")
    if args.json_output:
        command.append("--json-output")
    command += ["--", args.model_id]
    environ = {"HUGGINGFACE_HUB_CACHE": args.huggingface_hub_cache} if args.huggingface_hub_cache else {}
    child = Child("download", command, stdout=subprocess.PIPE, environ=environ)
    while child.exit_code is None:
        if signals.count:
            child.stop(DOWNLOAD_STOP_TIMEOUT_S, lambda: signals.count > 1)
            raise Stopped
        time.sleep(POLL_S)
    assert child.process.stdout is not None
    lines = child.process.stdout.read().decode().splitlines()
    if child.exit_code is not None and child.exit_code < 0:
        raise LaunchError(f"DownloadError: {child.describe_end()}")
    if child.exit_code != 0 or not lines:
        raise LaunchError(f"DownloadError: {args.model_id} could not be fetched; the reason is above")
    logger.info("Successfully downloaded weights for %s", args.model_id)
    return lines[-1]


def start(args: LauncherArgs, model_path: str, listener: socket.socket) -> tuple[Child, Child]:
    """Start the engine and the HTTP process with the two ends of a socket pair between them."""
    http_end, engine_end = socket.socketpair()
    with http_end, engine_end:
        num_threads = min(args.omp_num_threads or available_cores(), os.cpu_count() or 1)
        engine_config = EngineConfig(
            model_path=model_path,
            dtype=args.dtype,
            max_input_tokens=args.max_input_tokens,
            max_total_tokens=args.max_total_tokens,
            max_batch_prefill_tokens=args.max_batch_prefill_tokens,
            max_batch_total_tokens=args.max_batch_total_tokens,
            max_batch_size=args.max_batch_size,
            memory_fraction=args.cuda_memory_fraction,
            kv_memory_share=args.tgi_wiggle_room,
            quantize=args.quantize,
            quantize_head=args.quantize_head,
            rope_scaling=args.rope_scaling,
            rope_factor=args.rope_factor,
            is_prefix_caching=args.prefix_caching,
            num_threads=num_threads,
            socket_fd=engine_end.fileno(),
            log_level=args.log_level,
            is_json_output=args.json_output,
        )
        server_config = ServerConfig(
            model_id=args.model_id,
            model_path=model_path,
            model_sha=snapshot_commit(model_path),
            listen_fd=listener.fileno(),
            engine_fd=http_end.fileno(),
            max_concurrent_requests=args.max_concurrent_requests,
            max_best_of=args.max_best_of,
            max_stop_sequences=args.max_stop_sequences,
            max_top_n_tokens=args.max_top_n_tokens,
            max_client_batch_size=args.max_client_batch_size,
            validation_workers=args.validation_workers,
            payload_limit=args.payload_limit,
            is_grammar_disabled=args.disable_grammar_support,
            tokenizer_config_path=args.tokenizer_config_path,
            api_key=args.api_key,
            cors_allow_origin=args.cors_allow_origin,
            is_strict_tgi=args.strict_tgi,
            graceful_termination_timeout_s=args.graceful_termination_timeout,
            compute_type=args.compute_type or "cpu",
            log_level=args.log_level,
            is_json_output=args.json_output,
        )
        environ = engine_environment(num_threads, dict(os.environ))
        torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        engine = Child(
            ENGINE_NAME,
            [*PYTHON, "engine"],
            config=engine_config.to_json(),
            fds=[engine_end.fileno()],
            environ={**environ, **torchrun},
        )
        http = Child(
            "webserver",
            [*PYTHON, "server"],
            config=server_config.to_json(),
            fds=[listener.fileno(), http_end.fileno()],
            # glibc gives every thread an arena; after a few huge prompts on the tokenizer's threads they stay large.
            environ={"MALLOC_ARENA_MAX": "2"},
        )
    return http, engine


def supervise(http: Child, engine: Child, signals: Signals, drain_s: float) -> None:
    """Watch until a child ends (raises LaunchError) or a signal comes (raises Stopped); then stop the rest."""
    children = (engine, http)
    stopped_s = dict.fromkeys(children, 0.0)
    while not signals.count and all(child.exit_code is None for child in children):
        time.sleep(POLL_S)
        for child in children:
            stopped_s[child] = stopped_s[child] + POLL_S if child.is_stopped else 0.0
            if stopped_s[child] > STOPPED_S:
                logger.error("%s has been stopped (SIGSTOP) for %g s: killing it", child.name, STOPPED_S)
                child.process.kill()
                child.process.wait()
    if signals.count:
        http.process.terminate()  # before the log, which may be held up by whoever reads it
        logger.info("Terminating webserver")
        logger.info("Waiting for webserver to gracefully shutdown: running requests may end within %g s", drain_s)
        http.stop(drain_s + LAST_EVENTS_TIMEOUT_S, lambda: signals.count > 1)
        if engine.exit_code is not None and engine.exit_code < 0:
            logger.error("%s", engine.describe_end())
        logger.info("Shutting down shards")
        engine.stop(STOP_TIMEOUT_S, lambda: signals.count > 1)
        raise Stopped
    cause = find_cause(children)
    is_hung = cause.exit_code == ENGINE_HUNG_EXIT_CODE
    is_engine = cause is engine or is_hung
    logger.error("Shard 0 crashed" if is_engine else "Webserver Crashed")
    http.stop(STOP_TIMEOUT_S, lambda: signals.count > 0)
    engine.stop(STOP_TIMEOUT_S, lambda: is_hung or signals.count > 0)
    raise LaunchError(f"{failure_name(cause, is_engine=is_engine)}: {cause.describe_end()}")


def failure_name(cause: Child, *, is_engine: bool) -> str:
    """What TGI's launcher calls it (reference `tgi-cli.md` 1.1)."""
    if not is_engine:
        return "WebserverFailed"
    return "ShardCannotStart" if cause.exit_code == START_FAILED_EXIT_CODE else "ShardFailed"


def find_cause(children: Sequence[Child]) -> Child:
    """The child that ended for a reason of its own: not because its peer was gone, which may be noticed earlier."""
    deadline = time.monotonic() + CAUSE_TIMEOUT_S
    while time.monotonic() < deadline:
        for child in children:
            if child.exit_code not in (None, PEER_GONE_EXIT_CODE):
                return child
        time.sleep(POLL_S)
    return next(child for child in children if child.exit_code is not None)


def snapshot_commit(model_path: str) -> str | None:
    """The commit of a snapshot in the Hub's cache (`.../snapshots/<commit>`), None for any other folder."""
    path = Path(model_path)
    return path.name if path.parent.name == "snapshots" else None


if __name__ == "__main__":
    main()
