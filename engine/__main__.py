"""One engine rank: `python -m engine`, its configuration on standard input, torchrun's variables in the environment."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

import msgspec

from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.exit_codes import PEER_GONE_EXIT_CODE, RANK_LOST_EXIT_CODE, START_FAILED_EXIT_CODE
from engine.link.ipc import EngineEndpoint, exit_when_closed
from engine.link.logs import configure_logging
from engine.link.messages import EngineStarting
from engine.link.progress import Stage, StartProgress
from engine.memory import check_address_space

if TYPE_CHECKING:
    from engine.ranks import Ranks

logger = logging.getLogger("engine.main")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the launcher alone
    config = EngineConfig.from_json(sys.stdin.readline())
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    level = "warn" if config.log_level == "info" and not is_first_here else config.log_level
    name = "engine" if os.environ.get("WORLD_SIZE", "1") == "1" else f"engine {os.environ['RANK']}"
    configure_logging(level, name, is_json=config.is_json_output)
    exit_when_closed(sys.stdin.fileno(), logger.error)
    try:
        check_address_space()
        leave(serve(config))
    except StartError as error:
        logger.error("%s", error)
        leave(START_FAILED_EXIT_CODE)
    except EOFError as error:  # the usual end: the launcher stops the HTTP process first
        logger.info("%s", error)
        leave(PEER_GONE_EXIT_CODE)
    except Exception:
        logger.exception("The engine failed")
        leave(1)


def serve(config: EngineConfig) -> int:
    """Serve as the rank that torchrun's variables name.

    Returns the exit code of a follower that ends in good order, or of any rank that has lost another one.
    """
    from engine.ranks import Ranks
    from engine.start import start_follower
    from parallel.state import RankLostError
    from parallel.world import RendezvousError, World, meet

    world = World.from_environ(os.environ)
    if world.size == 1:
        lead(config, None)
    try:
        rendezvous = meet(world, config.listen_fd, config.shard_secret)
    except (RendezvousError, RankLostError) as error:
        raise StartError(str(error)) from error
    ranks = Ranks(rendezvous, config.shard_timeout_s)
    try:
        if world.rank == 0:
            signal.signal(signal.SIGTERM, lambda number, frame: break_off(ranks))
            lead(config, ranks)
        follower = start_follower(config, ranks)
        ignore_signals()
        follower.serve()
    except RankLostError as error:
        ranks.end_lost(error)
        return RANK_LOST_EXIT_CODE
    except EOFError:
        raise
    except StartError as error:
        ranks.tell(str(error))
        if world.local_rank == 0:
            raise
        return RANK_LOST_EXIT_CODE  # the first rank of this host has the same error, or hears of it
    except Exception as error:
        ranks.tell(f"rank {world.rank} failed: {error!r}")
        raise
    return 0


def lead(config: EngineConfig, ranks: Ranks | None) -> NoReturn:
    """Serve as rank 0. Raises EOFError when the HTTP process is gone."""
    from engine.start import start_engine

    assert config.socket_fd is not None
    endpoint = EngineEndpoint(socket.socket(fileno=config.socket_fd))

    def tell(stage: Stage, done: float | None, text: str) -> None:
        endpoint.send(EngineStarting(stage=stage, done=done, text=text))

    core, ready = start_engine(config, ranks, StartProgress(tell))
    ignore_signals()
    endpoint.send(msgspec.structs.replace(ready, pid=os.getpid()))
    if ranks is None:
        core.serve(endpoint)
    try:
        core.serve(endpoint, ranks.check)
    except EOFError as error:
        if core.is_dismissed:
            ranks.end()
        else:
            ranks.tell(str(error))
        raise


def break_off(ranks: Ranks) -> NoReturn:
    """End while starting, in good order: a follower that is ready would take the end for a failure."""
    ranks.end()
    leave(0)


def leave(code: int) -> NoReturn:
    """End at once: the interpreter would take torch and Numba apart first, for a second of processor time."""
    logging.shutdown()
    os._exit(code)


def ignore_signals() -> None:
    """Leave the end to the socket from now on; while it loads, a signal ends a rank at any point.

    A service manager sends SIGTERM to every process at once, and requests that are running or still arriving must reach
    their end.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
