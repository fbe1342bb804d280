"""The HTTP process: `python -m server`, its configuration on standard input."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import os
import signal
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI

from engine.link.errors import EngineDeadError, EngineHungError, GenerationError, StartError
from engine.link.exit_codes import ENGINE_HUNG_EXIT_CODE, PEER_GONE_EXIT_CODE
from engine.link.ipc import exit_when_closed, read_line
from engine.link.logs import configure_logging
from engine.link.progress import Stage
from server.app import create_app
from server.client import EngineClient
from server.config import READY_LINE, ServerConfig
from server.edge.access import CorsHeaders
from server.edge.connection import Connection
from server.edge.connections import ConnectionLimits, ConnectionTable, raise_descriptor_limit
from server.edge.starting import Gate, StartingApp, StartState
from server.text.tokenizer import TextTokenizer
from server.ui.address import page_lines

logger = logging.getLogger("server.main")

STDIN = 0
LISTEN_BACKLOG = 2048
IDLE_CONNECTION_S = 75
"""Longer than clients and balancers keep idle connections (60 s and less; TGI keeps them for ever). The server must not
be the first to close: the next request may be on its way already."""
DEAD_ENGINE_DRAIN_S = 3
"""The drain's time when the engine is gone: every stream ends with an error event."""
LAST_EVENTS_S = 3.0
"""The time of clients to read the error event that ends their stream when the drain's time is over."""


class DrainingServer(uvicorn.Server):
    """Ends the requests that outlast the drain."""

    def __init__(self, config: uvicorn.Config, engine: EngineClient, drain_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_s = drain_s
        self.is_listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let nobody in any more, and wait until the running requests have ended or their time is over."""
        self._engine.is_stopping = True
        timer = asyncio.get_running_loop().call_later(self._drain_s, self._end_requests)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
        self._engine.say_goodbye()  # not later: after a signal uvicorn ends the process as soon as it has shut down

    def _end_requests(self) -> None:
        # uvicorn breaks off requests that are still sending their bodies, and would log a traceback for each.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)
        logger.warning("The running requests took longer than %g s to end: ending them", self._drain_s)
        self._engine.refuse(GenerationError("the server is stopping"))


class Launcher:
    """What the launcher says after the configuration: how far a download is, and in the end what is served."""

    def __init__(self, config: ServerConfig, state: StartState) -> None:
        self._config = config
        self._state = state
        self._loop = asyncio.get_running_loop()
        self.config: asyncio.Future[ServerConfig] = self._loop.create_future()
        """The whole configuration."""
        if config.model_path:
            self.config.set_result(config)

    def take_line(self, line: bytes) -> None:
        """Any thread may call this."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, as this process soon will
            self._loop.call_soon_threadsafe(self._take, json.loads(line))

    def _take(self, fields: dict[str, Any]) -> None:
        if "stage" in fields:
            self._state.take(**fields)
        else:
            self._state.take(Stage.STARTING)
            self.config.set_result(self._config.completed(fields))


def main() -> None:
    # Ctrl-C is for the launcher alone. uvicorn sets its own handler when it serves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = ServerConfig.from_json(read_line(STDIN))
    configure_logging(config.log_level, "webserver", is_json=config.is_json_output, has_user_text=True)
    try:
        with asyncio.Runner(loop_factory=uvicorn.Config(app="", log_config=None).get_loop_factory()) as runner:
            runner.run(serve(config))
    except StartError as error:
        logger.error("%s", error)
        sys.exit(1)
    except EngineDeadError as error:
        logger.error("%s", error)
        sys.exit(PEER_GONE_EXIT_CODE)
    except EngineHungError as error:
        logger.error("%s", error)
        sys.exit(ENGINE_HUNG_EXIT_CODE)
    except Exception as error:
        logger.exception("The webserver failed: %s", error)
        sys.exit(1)


async def serve(config: ServerConfig) -> None:
    """Serve until a signal.

    Raises EngineDeadError or EngineHungError if the engine ends, StartError if there is no tokenizer or no free port.
    """
    state = StartState()
    launcher = Launcher(config, state)
    exit_when_closed(STDIN, logger.error, launcher.take_line)
    engine = EngineClient(socket.socket(fileno=config.engine_fd), config.engine_silence_s)
    engine.observe_start = lambda message: state.take(message.stage, message.done, message.text)
    starting = StartingApp(state, has_pages=config.has_pages)
    gate = Gate(CorsHeaders(starting, config.cors_allow_origin, is_strict=config.is_strict_tgi))
    server = make_server(gate, engine, config.graceful_termination_timeout_s)
    opening = asyncio.create_task(open_gate(gate, launcher, engine))
    if not config.is_listening_early:
        await opening
    listener = _listening(config.listen_fd)
    watcher = asyncio.create_task(_watch(opening, engine, server, ready_lines(config, listener)))
    await server.serve(sockets=[listener])
    watcher.cancel()
    if opening.done():
        opening.result()
    engine.raise_if_dead()
    await engine.close()


def make_server(gate: Gate, engine: EngineClient, drain_s: float) -> DrainingServer:
    limits = ConnectionLimits(max_connections=raise_descriptor_limit())
    config = uvicorn.Config(
        gate,
        http=Connection.listed_in(ConnectionTable(limits)),
        ws="none",
        timeout_keep_alive=IDLE_CONNECTION_S,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(drain_s + LAST_EVENTS_S),
    )
    return DrainingServer(config, engine, drain_s)


async def open_gate(gate: Gate, launcher: Launcher, engine: EngineClient) -> None:
    """Return once the application answers. Raises StartError, or EngineDeadError if the engine ends before."""
    config = await launcher.config
    tokenizer = await asyncio.to_thread(
        TextTokenizer.from_folder,
        config.model_path,
        config.validation_workers,
        config.tokenizer_config_path,
        is_strict=config.is_strict_tgi,
    )
    await engine.connect()
    app: FastAPI = create_app(engine, config, tokenizer)
    for name in [name for name in os.environ if name.startswith("OTEL_")]:  # read by now; children don't need them
        del os.environ[name]
    tune_garbage_collection()
    await gate.open(app)


def tune_garbage_collection() -> None:
    """Let the collector look neither at what is loaded by now nor often at all that is not new: it stops every stream.

    A large body makes a hundred thousand objects, and each full collection in the meantime would look at them all.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 10, 100)


def _listening(fd: int) -> socket.socket:
    """The bound socket, now listening. Raises StartError if another process listens on its port by now."""
    listener = socket.socket(fileno=fd)
    try:
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        port = listener.getsockname()[1]
        raise StartError(f"Cannot listen on port {port} ({error.strerror}): give another --port") from error
    return listener


def ready_lines(config: ServerConfig, listener: socket.socket) -> list[str]:
    """What the log says once the server answers. Replicas, whose line is another, listen on ports that nobody calls."""
    has_page = config.has_pages and config.ready_line == READY_LINE
    return [*(page_lines(listener) if has_page else []), config.ready_line]


async def _watch(opening: asyncio.Task[None], engine: EngineClient, server: DrainingServer, lines: list[str]) -> None:
    """Log the readiness line that scripts look for; end the server when the start fails, or the engine is gone."""
    await asyncio.wait([opening])
    if opening.exception() is None:
        await server.is_listening.wait()
        for line in lines:
            logger.info(line)
        await engine.watch()
        logger.error("There is no engine any more: stopping")
    server.config.timeout_graceful_shutdown = DEAD_ENGINE_DRAIN_S
    server.should_exit = True


if __name__ == "__main__":
    main()
