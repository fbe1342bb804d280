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

logger = logging.getLogger(__name__)


class StopRequest:
    """SIGTERM ends the engine once it has nothing to do; SIGINT is for the launcher alone.

    A service manager sends SIGTERM to every process at once: the running streams must still reach their end.
    """

    def __init__(self) -> None:
        self._is_set = False
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _handle(self, number: int, frame: object) -> None:
        self._is_set = True

    def __call__(self) -> bool:
        return self._is_set


def main() -> None:
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
    # Loading takes seconds and can be broken off at any point; only serving ends between steps.
    from engine.start import start_engine

    core, ready = start_engine(config)
    should_stop = StopRequest()
    endpoint.send(ready)
    core.serve(endpoint, should_stop)


if __name__ == "__main__":
    main()
