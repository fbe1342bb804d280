"""The HTTP process: `python -m server`, its configuration on standard input."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

import uvicorn

from engine.config import PEER_GONE_EXIT_CODE
from engine.errors import EngineDeadError, StartError
from engine.ipc import exit_when_closed
from engine.logs import configure_logging
from server.app import create_app
from server.client import EngineClient
from server.config import ServerConfig
from server.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

LISTEN_BACKLOG = 2048
DEAD_ENGINE_DRAIN_S = 3
"""When the engine is gone every stream ends with an error event; nobody is waited for longer than this."""


class AnnouncingServer(uvicorn.Server):
    """Logs the readiness line that scripts look for, once connections are accepted."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        logger.info("Connected")


def main() -> None:
    config = ServerConfig.from_json(sys.stdin.readline())
    configure_logging(config.log_level, "webserver")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    exit_when_closed(sys.stdin.fileno(), logger.error)
    try:
        with asyncio.Runner(loop_factory=uvicorn.Config(app="", log_config=None).get_loop_factory()) as runner:
            runner.run(serve(config))
    except StartError as error:
        logger.error("%s", error)
        sys.exit(1)
    except EngineDeadError as error:
        logger.error("%s", error)
        sys.exit(PEER_GONE_EXIT_CODE)


async def serve(config: ServerConfig) -> None:
    """Serve until a signal. Raises EngineDeadError when the engine ends first, StartError for a bad tokenizer."""
    tokenizer = TextTokenizer.from_folder(config.model_path, config.validation_workers)
    engine = EngineClient(socket.socket(fileno=config.engine_fd))
    await engine.connect()
    server = AnnouncingServer(
        uvicorn.Config(
            create_app(engine, config, tokenizer),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=config.graceful_termination_timeout_s,
        )
    )
    watcher = asyncio.create_task(_stop_when_dead(engine, server))
    await server.serve(sockets=[_listening(config.listen_fd)])
    watcher.cancel()
    if engine.dead.is_set():
        raise EngineDeadError("the engine has ended")
    await engine.close()


def _listening(fd: int) -> socket.socket:
    """The bound socket, now listening. Raises StartError if somebody else came to listen on its port meanwhile."""
    listener = socket.socket(fileno=fd)
    try:
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        port = listener.getsockname()[1]
        raise StartError(f"Cannot listen on port {port} ({error.strerror}): give another --port") from error
    return listener


async def _stop_when_dead(engine: EngineClient, server: uvicorn.Server) -> None:
    await engine.dead.wait()
    logger.error("The engine has ended: stopping")
    server.config.timeout_graceful_shutdown = DEAD_ENGINE_DRAIN_S
    server.should_exit = True


if __name__ == "__main__":
    main()
