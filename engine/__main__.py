"""One engine rank: `python -m engine`, its configuration on standard input, torchrun's variables in the environment."""

from __future__ import annotations

import logging
import signal
import socket
import sys

from engine.config import PEER_GONE_EXIT_CODE, START_FAILED_EXIT_CODE, EngineConfig
from engine.errors import StartError
from engine.ipc import EngineEndpoint, exit_when_closed
from engine.logs import configure_logging

logger = logging.getLogger("engine.main")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the launcher alone
    config = EngineConfig.from_json(sys.stdin.readline())
    configure_logging(config.log_level, "engine", is_json=config.is_json_output)
    exit_when_closed(sys.stdin.fileno(), logger.error)
    assert config.socket_fd is not None
    endpoint = EngineEndpoint(socket.socket(fileno=config.socket_fd))
    try:
        serve(config, endpoint)
    except StartError as error:
        logger.error("%s", error)
        sys.exit(START_FAILED_EXIT_CODE)
    except EOFError as error:  # the usual end: the launcher stops the HTTP process first
        logger.info("%s", error)
        sys.exit(PEER_GONE_EXIT_CODE)
    except Exception:
        logger.exception("The engine failed")
        sys.exit(1)


def serve(config: EngineConfig, endpoint: EngineEndpoint) -> None:
    from engine.start import start_engine

    core, ready = start_engine(config)
    # Loading can be broken off at any point. From now on the end is the socket's: a service manager sends SIGTERM to
    # every process at once, and requests that are running or still arriving must reach their end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    endpoint.send(ready)
    core.serve(endpoint)


if __name__ == "__main__":
    main()
