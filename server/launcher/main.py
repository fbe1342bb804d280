"""text-generation-launcher: resolve the flags, bind the port, start the processes, watch them, stop them.

Standard library only. Each child gets its configuration as one JSON line on standard input, and treats the end of that
pipe as the end of the launcher. Exit codes are TGI's (reference `tgi-cli.md` 1.1): 0 after a signal, 1 when something
failed, 2 for a usage error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from engine.link.config import EngineConfig
from engine.link.environment import engine_environment
from engine.link.errors import StartError
from engine.link.logs import configure_logging
from server.config import ServerConfig
from server.launcher.args import ArgumentError, LauncherArgs, Sharding, parse_args
from server.launcher.children import ENGINE_NAME, POLL_S, Child, LaunchError, Signals, Stopped, supervise
from server.launcher.host import available_cores, describe_runtime, is_ip_address

logger = logging.getLogger("launcher")

PYTHON = (sys.executable, "-P", "-m")
"""-P: a folder `server` or `engine` where the launcher was started is somebody else's code."""
DOWNLOAD_STOP_TIMEOUT_S = 10
ENGINE_SILENCE_S = 20.0
"""How long the engine may say nothing: it speaks at least once a second while idle, on a CPU a step is cut to 5 s."""
ENGINE_SILENCE_MARGIN_S = 10.0
"""Rank 0 is silent while it waits for another one, and is to say itself that this one hangs."""


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
    except Stopped as stopped:
        logger.info("%s", stopped)
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
    if 0 not in args.sharding.ranks:
        model_path = find_model(args, signals)
        supervise(None, start_ranks(args, model_path), signals, args.graceful_termination_timeout)
    with bind(args.hostname, args.port) as listener, meeting_point(args.sharding) as meeting:
        model_path = find_model(args, signals)
        http_end, engine_end = socket.socketpair()
        with http_end, engine_end:
            engines = start_ranks(args, model_path, engine_end, meeting)
            logger.info("Starting Webserver for %s on port %d", args.model_id, listener.getsockname()[1])
            http = start_webserver(args, model_path, listener, http_end)
    supervise(http, engines, signals, args.graceful_termination_timeout)


def bind(hostname: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a busy port fails before the weights load."""
    hostname = "127.0.0.1" if hostname == "localhost" else hostname.strip("[]")
    if not is_ip_address(hostname):
        logger.warning("Invalid hostname, defaulting to 0.0.0.0")
        hostname = "0.0.0.0"
    return bound(hostname, port, "Cannot listen", "--hostname", "--port")


def bound(
    address: str, port: int, complaint: str, address_flag: str, port_flag: str, *, is_listening: bool = False
) -> socket.socket:
    """A socket at an IP address. Raises LaunchError with the complaint and the flag that mends it."""
    with contextlib.ExitStack() as stack:
        try:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            if is_listening:
                listener.listen()
        except OSError as error:
            flag = port_flag if error.errno in (errno.EADDRINUSE, errno.EACCES) else address_flag
            raise LaunchError(f"{complaint} on {address}:{port} ({error.strerror}): give another {flag}") from error
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


def start_ranks(
    args: LauncherArgs,
    model_path: str,
    engine_end: socket.socket | None = None,
    meeting: socket.socket | None = None,
) -> list[Child]:
    """Start this host's engine ranks.

    Rank 0 gets its end of the socket pair to the HTTP process, and the socket where the ranks meet.
    """
    sharding = args.sharding
    if sharding.size > 1:
        logger.info("Sharding model on %d processes", sharding.size)
    port = sharding.port if meeting is None else meeting.getsockname()[1]
    num_threads = max(1, min(args.omp_num_threads or available_cores(), os.cpu_count() or 1) // sharding.local_size)
    environ = {
        **engine_environment(num_threads, dict(os.environ)),
        "WORLD_SIZE": str(sharding.size),
        "LOCAL_WORLD_SIZE": str(sharding.local_size),
        "MASTER_ADDR": resolved(sharding.address),
        "MASTER_PORT": str(port),
    }
    ranks = []
    for local_rank, rank in enumerate(sharding.ranks, start=sharding.first_local_rank):
        sockets = [engine_end, meeting] if rank == 0 else []
        logger.info("Starting shard")
        config = engine_config(args, model_path, num_threads, *sockets)
        ranks.append(
            Child(
                f"{ENGINE_NAME} {rank}",
                [*PYTHON, "engine"],
                config=config.to_json(),
                fds=[sock.fileno() for sock in sockets if sock is not None],
                environ={**environ, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
            )
        )
    return ranks


def engine_config(
    args: LauncherArgs,
    model_path: str,
    num_threads: int,
    engine_end: socket.socket | None = None,
    meeting: socket.socket | None = None,
) -> EngineConfig:
    return EngineConfig(
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
        max_draft_tokens=args.speculate,
        watermark_gamma=args.watermark_gamma,
        watermark_delta=args.watermark_delta,
        shard_timeout_s=args.shard_timeout,
        num_threads=num_threads,
        socket_fd=None if engine_end is None else engine_end.fileno(),
        listen_fd=None if meeting is None else meeting.fileno(),
        log_level=args.log_level,
        is_json_output=args.json_output,
    )


@contextlib.contextmanager
def meeting_point(sharding: Sharding) -> Iterator[socket.socket | None]:
    """Where the ranks will meet, listening before anything loads; None: another process holds it, or nobody meets."""
    if sharding.size == 1 or 0 not in sharding.ranks or sharding.is_torchrun:
        yield None
        return
    address = resolved(sharding.address)
    flags = "--master-addr", "--master-port"
    with bound(address, sharding.port, "The shards can't meet", *flags, is_listening=True) as listener:
        yield listener


def resolved(address: str) -> str:
    """The IP address of a host's name."""
    try:
        found = socket.getaddrinfo(address.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(
            f"--master-addr {address} can't be resolved ({error.strerror}): give an IP address"
        ) from error
    return str(min(found, key=lambda info: info[0] != socket.AF_INET)[4][0])


def start_webserver(args: LauncherArgs, model_path: str, listener: socket.socket, http_end: socket.socket) -> Child:
    """Start the HTTP process."""
    config = ServerConfig(
        model_id=args.model_id,
        model_path=model_path,
        model_sha=snapshot_commit(model_path),
        listen_fd=listener.fileno(),
        engine_fd=http_end.fileno(),
        engine_silence_s=engine_silence_s(args),
        max_concurrent_requests=args.max_concurrent_requests,
        max_best_of=args.max_best_of,
        max_stop_sequences=args.max_stop_sequences,
        max_top_n_tokens=args.max_top_n_tokens,
        max_client_batch_size=args.max_client_batch_size,
        validation_workers=args.validation_workers,
        payload_limit=args.payload_limit,
        has_prompt_logprobs=args.enable_prefill_logprobs,
        is_grammar_disabled=args.disable_grammar_support,
        tokenizer_config_path=args.tokenizer_config_path,
        api_key=args.api_key,
        cors_allow_origin=args.cors_allow_origin,
        is_strict_tgi=args.strict_tgi,
        graceful_termination_timeout_s=args.graceful_termination_timeout,
        compute_type=args.compute_type or "cpu",
        log_level=args.log_level,
        is_json_output=args.json_output,
        otlp_endpoint=args.otlp_endpoint,
        otlp_service_name=args.otlp_service_name,
    )
    return Child(
        "webserver",
        [*PYTHON, "server"],
        config=config.to_json(),
        fds=[listener.fileno(), http_end.fileno()],
        # glibc gives every thread an arena; after a few huge prompts on the tokenizer's threads they stay large.
        environ={"MALLOC_ARENA_MAX": "2"},
    )


def engine_silence_s(args: LauncherArgs) -> float:
    if args.sharding.size == 1:
        return ENGINE_SILENCE_S
    return max(ENGINE_SILENCE_S, args.shard_timeout + ENGINE_SILENCE_MARGIN_S)


def snapshot_commit(model_path: str) -> str | None:
    """The commit of a snapshot in the Hub's cache (`.../snapshots/<commit>`), None for any other folder."""
    path = Path(model_path)
    return path.name if path.parent.name == "snapshots" else None
