"""The start of the processes: find the model's folder, start the engine's ranks and the HTTP process.

Each child gets its configuration as one JSON line on standard input. The user fills a part of it (`LauncherArgs.engine`
and `.server`), the launcher the rest: paths, sockets, threads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.link.config import EngineConfig
from engine.link.environment import engine_environment
from engine.link.errors import StartError
from engine.link.model_files import ADAPTER_CONFIG, adapter_base
from engine.link.model_folders import (
    ADAPTER,
    MODEL,
    folder_suggestion,
    gguf_files,
    refuse_no_model,
    refuse_other_paths,
)
from engine.link.processor import available_cores
from server.config import ServerConfig
from server.launcher.args import LauncherArgs
from server.launcher.children import ENGINE_NAME, POLL_S, Child, Signals
from server.launcher.errors import LaunchError, Stopped
from server.launcher.lora_adapters import parse_adapters
from server.launcher.sockets import ip_address_of

logger = logging.getLogger("launcher")

PYTHON = (sys.executable, "-P", "-m")
"""-P: a folder `server` or `engine` where the launcher was started is somebody else's code."""
HUB_SECRETS = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_")
"""Beginnings of the names of the variables with which the Hub is asked."""
COLLECTOR_SECRETS = ("OTEL_",)
"""Beginnings of the names of the variables with which traces are sent."""
DOWNLOAD_STOP_TIMEOUT_S = 10
ENGINE_SILENCE_S = 20.0
"""An engine that says nothing for longer hangs. It speaks at least once a second while idle; on a CPU a step takes 5 s
at most."""
ENGINE_SILENCE_MARGIN_S = 10.0
"""Rank 0 is silent while it waits for another rank. It needs time to say itself that this rank hangs."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFolders:
    """The local folders of what is served."""

    model: str
    adapter: str | None = None
    """The adapter that is merged into the model, if --model-id names one."""
    loras: tuple[tuple[str, str], ...] = ()
    """Name and folder of each adapter beside the model."""


def find_folders(args: LauncherArgs, signals: Signals, webserver: Child | None = None) -> ModelFolders:
    """The folders of the model and of the adapters beside it. Raises LaunchError, StartError, Stopped.

    The `webserver` is told how far a download is; it goes on only as long as the webserver lives.
    """
    fetch = functools.partial(_find_folder, args, signals=signals, webserver=webserver)
    folders = find_model(args, fetch)
    loras = []
    for adapter in parse_adapters(args.lora_adapters):
        if os.path.isdir(adapter.source):
            if adapter.revision is not None:
                raise LaunchError(
                    f"{adapter.source} is a folder here and has no revision: leave @{adapter.revision} out"
                )
            folder = adapter.source
        elif gguf_files(adapter.source):
            raise LaunchError(
                f"{adapter.source} is in GGUF, and an adapter (LoRA) is a folder with {ADAPTER_CONFIG}, as peft "
                "writes: give that"
            )
        else:
            try:
                folder = fetch(adapter.source, adapter.revision, is_adapter=True)
            except StartError as error:
                raise StartError(f"--lora-adapters {adapter.name}: {error}") from error
        loras.append((adapter.name, folder))
    if loras:
        logger.info("Adapters that requests may name: %s", ", ".join(name for name, _ in loras))
    return dataclasses.replace(folders, loras=tuple(loras))


def find_model(args: LauncherArgs, fetch: Callable[[str, str | None], str]) -> ModelFolders:
    """The folders that --model-id names, with those of an adapter's model. Raises LaunchError, StartError, Stopped."""
    folder = fetch(args.model_id, args.revision)
    base = adapter_base(Path(folder))
    if base is None:
        return ModelFolders(folder)
    logger.info("%s is an adapter, to be merged into %s", args.model_id, base.model_id)
    is_local = os.path.exists(base.model_id)  # a folder, or a GGUF file
    if not is_local and base.model_id.startswith(("/", ".")):
        raise LaunchError(
            f"{args.model_id} is an adapter of {base.model_id}, which is not here: correct "
            f"base_model_name_or_path in {Path(folder, ADAPTER_CONFIG)}"
        )
    model = fetch(base.model_id, None if is_local else base.revision)
    if adapter_base(Path(model)) is not None:
        raise LaunchError(f"{args.model_id} is an adapter of {base.model_id}, which is one itself: merge that first")
    return ModelFolders(model, folder)


def _find_folder(
    args: LauncherArgs,
    model_id: str,
    revision: str | None,
    *,
    signals: Signals,
    webserver: Child | None,
    is_adapter: bool = False,
) -> str:
    """The local folder of a model or an adapter. A child process fetches it from the Hub if `model_id` is no folder.

    With an adapter comes its model. If it `is_adapter` to stand beside another model, its own files come alone.
    """
    is_read_here = bool(gguf_files(model_id))
    if is_read_here:
        logger.info("%s is in GGUF: configuration and tokenizer are read from the file", model_id)
    elif os.path.isdir(model_id):
        if revision is None:
            refuse_no_model(Path(model_id))
            return model_id
    else:
        refuse_other_paths(model_id, ADAPTER if is_adapter else MODEL)
    if not is_read_here:
        logger.info("Starting check and download process for %s", model_id)
    command = [*PYTHON, "engine.cli", "download-weights", "--lifeline"]
    if revision is not None:
        command.append(f"--revision={revision}")
    command += ["--json-output"] * args.is_json_output + ["--adapter"] * is_adapter + ["--", model_id]
    environ = {"HUGGINGFACE_HUB_CACHE": args.huggingface_hub_cache} if args.huggingface_hub_cache else {}
    child = Child("download", command, stdout=subprocess.PIPE, environ=environ, kept_secrets=HUB_SECRETS)
    lines = _follow_download(child, signals, webserver)
    if child.exit_code is not None and child.exit_code < 0:
        raise LaunchError(f"DownloadError: {child.describe_end()}")
    if child.exit_code != 0 or not lines:
        if is_read_here:
            raise LaunchError(f"{model_id} can't be read; the reason is above")
        raise _download_error(model_id, is_adapter=is_adapter)
    if not is_read_here:
        logger.info("Successfully downloaded weights for %s", model_id)
    return lines[-1]


def _download_error(model_id: str, *, is_adapter: bool) -> LaunchError:
    named = f"the adapter {model_id} of --lora-adapters" if is_adapter else model_id
    return LaunchError(f"DownloadError: {named} could not be fetched{folder_suggestion(model_id)}; the reason is above")


def _follow_download(child: Child, signals: Signals, webserver: Child | None) -> list[str]:
    """The lines that the child has written at its end, but for its reports, which go on to the webserver.

    Raises Stopped, or LaunchError if the webserver ends before.
    """
    assert child.process.stdout is not None
    os.set_blocking(child.process.stdout.fileno(), False)
    output, lines = b"", []
    is_over = False
    while not is_over:
        is_over = child.exit_code is not None  # what it has written by then is read below
        if signals.count or (webserver is not None and webserver.exit_code is not None):
            child.stop(DOWNLOAD_STOP_TIMEOUT_S, lambda: signals.count > 1)
            if signals.count or webserver is None:
                raise Stopped
            logger.error("Webserver Crashed")
            raise LaunchError(f"WebserverFailed: {webserver.describe_end()}")
        *whole, output = (output + (child.process.stdout.read() or b"")).split(b"\n")
        reports = [line for line in whole if line.startswith(b"{")]
        lines += [line.decode() for line in whole if line not in reports]
        if reports and webserver is not None and not webserver.is_stopped:  # it would not read
            webserver.tell(reports[-1].decode())
        if not is_over:
            time.sleep(POLL_S)
    return lines


def start_ranks(
    args: LauncherArgs,
    folders: ModelFolders,
    engine_end: socket.socket | None = None,
    rendezvous: socket.socket | None = None,
) -> list[Child]:
    """Start this host's engine ranks.

    Rank 0 gets `engine_end`, its end of the socket pair to the HTTP process, and the socket where the ranks meet.
    """
    sharding = args.sharding
    if sharding.size > 1:
        logger.info("Sharding model on %d processes", sharding.size)
    port = sharding.port if rendezvous is None else rendezvous.getsockname()[1]
    num_threads = max(1, min(args.omp_num_threads or available_cores(), os.cpu_count() or 1) // sharding.local_size)
    environ = {
        **engine_environment(num_threads, dict(os.environ)),
        "WORLD_SIZE": str(sharding.size),
        "LOCAL_WORLD_SIZE": str(sharding.local_size),
        "MASTER_ADDR": ip_address_of(sharding.address),
        "MASTER_PORT": str(port),
    }
    secret = shard_secret(args)
    ranks = []
    for local_rank, rank in enumerate(sharding.ranks, start=sharding.first_local_rank):
        logger.info("Starting shard")
        sockets = {"socket_fd": engine_end, "listen_fd": rendezvous} if rank == 0 else {}
        fds = {name: sock.fileno() for name, sock in sockets.items() if sock is not None}
        given = {**args.engine, **fds, "shard_secret": secret, "lora_adapters": folders.loras}
        config = EngineConfig(**given, model_path=folders.model, adapter_path=folders.adapter, num_threads=num_threads)
        ranks.append(
            Child(
                f"{ENGINE_NAME} {rank}",
                [*PYTHON, "engine"],
                config=config.to_json(),
                fds=list(fds.values()),
                environ={**environ, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
            )
        )
    return ranks


WEBSERVER_ENVIRON = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
"""How glibc keeps the webserver's memory. It gives every thread an arena; after a few huge prompts on the tokenizer's
threads they stay large. With a fixed threshold a large block goes back to the system as soon as it is freed."""


def shard_secret(args: LauncherArgs) -> str:
    """The secret by which the ranks know each other: the user's, or on one host one that they inherit.

    Launchers of several hosts, and those that torchrun starts, have none in common unless the user gives one.
    """
    secret: str = args.engine.get("shard_secret", "")
    sharding = args.sharding
    if secret or sharding.size == 1:
        return secret
    if sharding.num_hosts == 1 and not sharding.is_torchrun:
        return secrets.token_hex(32)
    logger.warning(
        "The shards believe anybody who reaches %s: set SHARD_SECRET to one text on all hosts, or close the network "
        "to others",
        sharding.address,
    )
    return ""


def start_webserver(args: LauncherArgs, listener: socket.socket, http_end: socket.socket) -> Child:
    """Start the HTTP process, which waits for `tell_folders`.

    It listens early on a port, where browsers and probes ask; at a private socket a program waits until it listens, as
    TGI's clients do at the port.
    """
    config = ServerConfig(
        **args.server,
        model_path="",
        listen_fd=listener.fileno(),
        is_listening_early=listener.family != socket.AF_UNIX and not args.server.get("is_strict_tgi"),
        engine_fd=http_end.fileno(),
        engine_silence_s=engine_silence_s(args),
    )
    return Child(
        "webserver",
        [*PYTHON, "server"],
        config=config.to_json(),
        fds=[listener.fileno(), http_end.fileno()],
        environ=WEBSERVER_ENVIRON,
        kept_secrets=COLLECTOR_SECRETS if args.server.get("otlp_endpoint") else (),
    )


def tell_folders(webserver: Child, folders: ModelFolders) -> None:
    """Tell the webserver what it serves, as fields of its configuration."""
    fields = {
        "model_path": folders.model,
        "lora_adapters": [name for name, _ in folders.loras],
        "model_sha": snapshot_commit(folders.adapter or folders.model),
    }
    webserver.tell(json.dumps(fields))


def engine_silence_s(args: LauncherArgs) -> float:
    """Seconds after which the webserver takes the engine for hung."""
    if args.sharding.size == 1:
        return ENGINE_SILENCE_S
    return max(ENGINE_SILENCE_S, args.shard_timeout_s + ENGINE_SILENCE_MARGIN_S)


def snapshot_commit(model_path: str) -> str | None:
    """The commit of a snapshot in the Hub's cache (`.../snapshots/<commit>`), None for any other folder."""
    path = Path(model_path)
    return path.name if path.parent.name == "snapshots" else None
