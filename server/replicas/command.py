"""`pytgi serve MODEL --replicas N` and the launcher's flags: N servers on Ray behind one port."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine.link.errors import StartError
from engine.link.logs import configure_logging
from server.config import ServerConfig
from server.launcher.args import LauncherArgs, parse_args
from server.launcher.errors import ArgumentError, LaunchError
from server.launcher.sockets import bind
from server.ui.address import page_lines

logger = logging.getLogger("front")

ROOMS = Path(__file__).parents[2]
"""The folder of our packages. Ray's workers look for modules first where it was started."""
LISTEN_BACKLOG = 2048
OBJECT_STORE_BYTES = 100_000_000
"""Ray's shared memory, of which leases need next to nothing."""


def serve_replicas(argv: Sequence[str], usage: str) -> int:
    """Serve until a signal; the exit code. `argv` has flags of the launcher beside those of the parser here.

    `usage` is how a usage error says that the command is called.
    """
    parser = argparse.ArgumentParser("pytgi serve", usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("--replicas", required=True, type=_replicas)
    parser.add_argument("--replica-host")
    parser.add_argument("--deploy-only", action="store_true")
    parser.add_argument("-p", "--port", action="append", default=[])  # the front's, and no replica's
    parser.add_argument("--hostname", action="append", default=[])
    options, flags = parser.parse_known_args(argv)
    place = [*(f"--port={port}" for port in options.port), *(f"--hostname={name}" for name in options.hostname)]
    try:
        args = parse_args([*flags, *place], os.environ, usage)
        configure_logging(args.log_level, "front", is_json=args.is_json_output)
        _check_ray()
        with contextlib.ExitStack() as stack:
            listener = None if options.deploy_only else stack.enter_context(bind(args.hostname, args.port))
            is_own_ray = stack.enter_context(_ray())
            host = options.replica_host or ("127.0.0.1" if is_own_ray else None)
            directory = os.getcwd() if host else None  # relative folders of models mean something on this host only
            handle = _deploy({"flags": flags, "replicas": options.replicas, "host": host, "directory": directory})
            if listener is not None:
                asyncio.run(_serve(handle, listener, args))
    except ArgumentError as error:
        sys.exit(f"Error: {error}")
    except (LaunchError, StartError) as error:
        logger.error("%s", error)
        return 1
    return 0


def _replicas(text: str) -> str:
    """`N` or `MIN:MAX`. Raises ArgumentTypeError."""
    numbers = text.split(":")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of replicas nor MIN:MAX")
    if int(numbers[0]) > int(numbers[-1]):
        raise argparse.ArgumentTypeError(f"{text}: the first number is the smaller one")
    return text


def _check_ray() -> None:
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("aiohttp") is None:
        raise LaunchError("--replicas needs Ray Serve: pip install 'pytgi[ray]'")


@contextlib.contextmanager
def _ray() -> Iterator[bool]:
    """The Ray that RAY_ADDRESS names, or one that ends with the block; whether it is the latter."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)  # until the front serves
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # read on import; a line for each request is meant, however alike
    import ray
    from ray import serve

    is_own = not os.environ.get("RAY_ADDRESS")
    # Without an address Ray would join a cluster that somebody else has started here, or look for one that is gone.
    own = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        with contextlib.chdir(ROOMS):
            ray.init(namespace="serve", logging_level=logging.WARNING, **(own if is_own else {}))
    except SystemExit as stop:
        sys.exit(0 if stop.code == signal.SIGTERM else stop.code)  # Ray's own handler exits with the number
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        # ValueError: RAY_ADDRESS is no address. RayError: it asks for a token that is not there.
        raise LaunchError(f"There is no Ray: {error}") from error
    signal.signal(signal.SIGTERM, _exit)  # in place of Ray's
    logger.info("Ray runs: RAY_AUTH_MODE=token RAY_ADDRESS=%s reaches it", ray.get_runtime_context().gcs_address)
    try:
        yield is_own
    finally:
        if is_own:
            serve.shutdown()
        ray.shutdown()


def _exit(*_: object) -> NoReturn:
    """End as after any signal. What was started ends on the way out."""
    sys.exit(0)


def _deploy(app_args: Mapping[str, Any]) -> Any:
    """Give Serve the application; a handle once all replicas of this version run. Raises LaunchError."""
    from ray import serve
    from ray.exceptions import RayError

    from server.replicas.deployment import APP_NAME, build_app

    try:
        serve.start(proxy_location="Disabled")
        return serve.run(build_app(app_args), name=APP_NAME, route_prefix=None)
    except RayError as error:  # who started this Ray has ended it
        raise LaunchError(f"Ray was gone before all replicas ran: {str(error).partition(chr(10))[0]}") from error
    except RuntimeError as error:
        raise LaunchError(f"The replicas can't start, for a reason that their launchers say above: {error}") from error


async def _serve(handle: Any, listener: socket.socket, args: LauncherArgs) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests end within the drain's time."""
    from aiohttp import web

    from server.replicas.front import Front

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    config = ServerConfig(**args.server, model_path="", listen_fd=listener.fileno(), engine_fd=-1)  # no engine here
    front = Front(handle, is_strict=config.is_strict_tgi)
    runner = front.runner(args.graceful_termination_timeout_s)
    await runner.setup()
    await web.SockSite(runner, listener, backlog=LISTEN_BACKLOG).start()
    for line in [*(page_lines(listener) if config.has_pages else []), config.ready_line]:
        logger.info(line)
    await stopped.wait()
    logger.info("Stopping: running requests may end within %g s", args.graceful_termination_timeout_s)
    await runner.cleanup()
