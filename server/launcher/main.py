"""text-generation-launcher: resolve the flags, bind the port, start the processes, watch them, stop them.

Standard library only. A child treats the end of its standard input as the end of the launcher. Exit codes are TGI's: 0
after a signal, 1 when something failed, 2 for a usage error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Iterator

from engine.link.encoding import use_utf8
from engine.link.errors import StartError
from engine.link.logs import configure_logging
from server.config import READY_LINE
from server.launcher.args import LauncherArgs, parse_args
from server.launcher.children import STOP_TIMEOUT_S, Child, Signals, supervise
from server.launcher.errors import ArgumentError, LaunchError, Stopped
from server.launcher.host import describe_runtime
from server.launcher.parser import USAGE
from server.launcher.shard_check import check_model
from server.launcher.sockets import bind, describe_address, rendezvous_socket
from server.launcher.start import find_folders, start_ranks, start_webserver, tell_folders

logger = logging.getLogger("launcher")


def main(listener: socket.socket | None = None, usage: str = USAGE, ready_line: str = READY_LINE) -> None:
    """Console script. A `listener`, bound, is served in place of --hostname and --port. --help says `usage`.

    `ready_line` is what the log says once the server answers.
    """
    open_standard_streams()
    use_utf8()
    try:
        args = parse_args(sys.argv[1:], os.environ, usage)
        configure_logging(args.log_level, "launcher", is_json=args.is_json_output)
        run(dataclasses.replace(args, server={**args.server, "ready_line": ready_line}), listener)
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
    """Open the standard streams that a supervisor has closed.

    Otherwise a socket could get a number that means something in a child, or in a library.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


@contextlib.contextmanager
def stopped_on_failure(webserver: Child, signals: Signals) -> Iterator[None]:
    """Stop the webserver if the block fails, so that the cause is told last."""
    try:
        yield
    except BaseException:
        webserver.stop(STOP_TIMEOUT_S, lambda: signals.count > 1)
        raise


def run(args: LauncherArgs, listener: socket.socket | None = None) -> None:
    """Serve until a signal (raises Stopped) or a failure (raises LaunchError)."""
    signals = Signals()
    if args.is_runtime_logged:
        logger.info("Runtime environment:\n%s", describe_runtime())
    logger.info("Args: %s", args.echo)
    for warning in args.warnings:
        logger.warning("%s", warning)
    if 0 not in args.sharding.ranks:
        folders = find_folders(args, signals)
        check_model(folders.model, args.sharding)
        supervise(None, start_ranks(args, folders), signals, args.graceful_termination_timeout_s)
    with listener or bind(args.hostname, args.port) as listener, rendezvous_socket(args.sharding) as rendezvous:
        http_end, engine_end = socket.socketpair()
        with http_end, engine_end:
            logger.info("Starting Webserver for %s on %s", args.model_id, describe_address(listener))
            http = start_webserver(args, listener, http_end)
            with stopped_on_failure(http, signals):
                folders = find_folders(args, signals, http)
                check_model(folders.model, args.sharding)
                tell_folders(http, folders)
                engines = start_ranks(args, folders, engine_end, rendezvous)
    supervise(http, engines, signals, args.graceful_termination_timeout_s)
