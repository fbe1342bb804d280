"""The launcher's children: started in sessions of their own, watched, stopped in order; the cause of an end is named.

The children's exit codes say which of them was the cause (`engine.link.exit_codes`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from engine.link.exit_codes import (
    ENGINE_HUNG_EXIT_CODE,
    PEER_GONE_EXIT_CODE,
    RANK_LOST_EXIT_CODE,
    START_FAILED_EXIT_CODE,
)
from server.launcher.errors import LaunchError, Stopped

logger = logging.getLogger("launcher")

POLL_S = 0.1
SAME_MOMENT_S = 0.5
"""Two signals, or two ends, within this time count as one."""
STOPPED_S = 25.0
"""A child that is stopped (SIGSTOP) for longer is killed. The webserver notices a silent engine sooner, and can then
still tell its clients."""
ENGINE_NAME = "engine rank"
LAST_EVENTS_TIMEOUT_S = 5
"""The webserver's time, once its drain is over, to end the streams that are left."""
STOP_TIMEOUT_S = 5
"""The time of a child between SIGTERM and SIGKILL."""
LOST_TIMEOUT_S = 2
"""A rank that still runs so long after another one has ended hangs. Rank 0 tells its clients before it ends."""
CAUSE_TIMEOUT_S = 5
"""The time of a child to end once its peer has noticed that it is ending."""


SECRET = re.compile(r"(_|^)(TOKEN|AUTHTOKEN|KEY|SECRET|PASSWORD)$|^OTEL_EXPORTER_OTLP_.*HEADERS$")
"""Names of variables with secrets."""


def without_secrets(environ: Mapping[str, str], kept: Sequence[str] = ()) -> dict[str, str]:
    """`environ` without the variables that hold secrets, but for those that begin with one of `kept`.

    A child that needs the API key reads it off its standard input; a core dump or a child of its own shows the rest.
    """
    return {name: value for name, value in environ.items() if not SECRET.search(name) or name.startswith(tuple(kept))}


class Signals:
    """The number of SIGTERM, SIGINT and SIGHUP so far. The main loop acts on it."""

    def __init__(self) -> None:
        self.count = 0
        self._last_time = -math.inf
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup ignores SIGHUP: leave it so
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A closing terminal or a service manager sends two kinds at once, which is one wish to stop.
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
        kept_secrets: Sequence[str] = (),
        stdout: int | None = None,
    ) -> None:
        """`kept_secrets` are the beginnings of the variables with secrets that this child needs."""
        self.name = name
        self.is_hung = False
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stdout,
            pass_fds=fds,
            env={**without_secrets(os.environ, kept_secrets), **(environ or {})},
            start_new_session=True,
        )
        self.tell(config)

    def tell(self, line: str) -> None:
        """Send a further line on standard input. A child that has ended misses it: the main loop will see that."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line.encode() + b"\n")
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
        """The sentence of the log about how this child ended."""
        code = self.exit_code
        if code == ENGINE_HUNG_EXIT_CODE:
            return f"{ENGINE_NAME} 0 hangs and was killed; what it did last is above"
        if self.is_hung:
            return f"{self.name} hangs and was killed"
        if code == RANK_LOST_EXIT_CODE:
            return f"{self.name} has lost another rank; which and why is above"
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (the kernel does this when memory runs out)" if -code == signal.SIGKILL else ""
            return f"{self.name} was killed by {name}{hint}"
        return f"{self.name} ended with exit code {code}; its messages are above"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float, is_cut_short: Callable[[], bool]) -> None:
        """Send SIGTERM, wait, send SIGKILL. The wait ends early once `is_cut_short`."""
        if self.exit_code is None:
            self.process.terminate()
        deadline = time.monotonic() + timeout_s
        while self.exit_code is None and time.monotonic() < deadline and not is_cut_short():
            time.sleep(POLL_S)
        is_killed = self.exit_code is None
        if is_killed:
            self.kill()
        logger.info("%s %s", self.name, "killed" if is_killed else "terminated")


def supervise(http: Child | None, engines: Sequence[Child], signals: Signals, drain_s: float) -> NoReturn:
    """Watch until a child ends (raises LaunchError) or a signal comes (raises Stopped); then stop the rest.

    `http` is None on every host but the first. Ranks there end in good order when the first host ends (raises Stopped).
    """
    children = [*engines, *([http] if http else [])]
    wait_for_an_end(children, signals)
    if signals.count and http is not None:
        stop_serving(http, engines, signals, drain_s)
        raise Stopped
    if http is None and follow_first_host(engines, signals, drain_s):
        raise Stopped("Stopped by a signal" if signals.count else "The first host has ended the service")
    cause = find_cause(children)
    if cause.exit_code is None:
        # before the webserver is told to end: only without an engine does it tell its clients
        logger.error("%s hangs: killing it", cause.name)
        cause.is_hung = True
        cause.kill()
    is_hung = cause.exit_code == ENGINE_HUNG_EXIT_CODE
    is_engine = cause is not http or is_hung
    rank = 0 if is_hung else cause.name.removeprefix(f"{ENGINE_NAME} ")
    logger.error("%s", f"Shard {rank} crashed" if is_engine else "Webserver Crashed")
    if http is not None:
        http.stop(STOP_TIMEOUT_S, lambda: signals.count > 0)
    stop_all(engines, STOP_TIMEOUT_S, lambda: is_hung or signals.count > 0)
    raise LaunchError(f"{failure_name(cause, is_engine=is_engine)}: {cause.describe_end()}")


def wait_for_an_end(children: Sequence[Child], signals: Signals) -> None:
    """Return when a child has ended or a signal has come. A child that stays stopped (SIGSTOP) is killed."""
    stopped_s = dict.fromkeys(children, 0.0)
    while not signals.count and all(child.exit_code is None for child in children):
        time.sleep(POLL_S)
        for child in children:
            stopped_s[child] = stopped_s[child] + POLL_S if child.is_stopped else 0.0
            if stopped_s[child] > STOPPED_S:
                logger.error("%s has been stopped (SIGSTOP) for %g s: killing it", child.name, STOPPED_S)
                child.kill()


def stop_serving(http: Child, engines: Sequence[Child], signals: Signals, drain_s: float) -> None:
    """Stop in good order: no new requests, the running ones end, then the engine."""
    http.process.terminate()  # before the log line, which a slow reader of the log may hold up
    logger.info("Terminating webserver")
    logger.info("Waiting for webserver to gracefully shutdown: running requests may end within %g s", drain_s)
    http.stop(drain_s + LAST_EVENTS_TIMEOUT_S, lambda: signals.count > 1)
    for engine in engines:
        if engine.exit_code is not None and engine.exit_code < 0:
            logger.error("%s", engine.describe_end())
    logger.info("Shutting down shards")
    stop_all(engines, STOP_TIMEOUT_S, lambda: signals.count > 1)


def stop_all(engines: Sequence[Child], timeout_s: float, is_cut_short: Callable[[], bool]) -> None:
    """Stop the ranks side by side, `timeout_s` for all of them together."""
    deadline = time.monotonic() + timeout_s
    for engine in engines:
        if engine.exit_code is None:
            engine.process.terminate()
    for engine in engines:
        engine.stop(max(0.0, deadline - time.monotonic()), is_cut_short)


def follow_first_host(engines: Sequence[Child], signals: Signals, drain_s: float) -> bool:
    """Whether all ranks of a host that is not the first have ended in good order, or a signal has ended them.

    If the first host was stopped as well, it may still let its requests end: this host waits so long for it.
    """
    if signals.count:
        for engine in engines:
            engine.process.terminate()  # ends the ranks that don't serve yet; the others ignore it
        logger.info("Waiting for the first host to end, at most %g s; a second signal ends this one at once", drain_s)
    deadline = time.monotonic() + (drain_s + LAST_EVENTS_TIMEOUT_S if signals.count else STOP_TIMEOUT_S)
    while time.monotonic() < deadline and signals.count < 2:
        codes = [engine.exit_code for engine in engines]
        orderly = (0, -signal.SIGTERM) if signals.count else (0,)
        if all(code in orderly for code in codes):
            return True
        if any(code not in (None, *orderly) for code in codes):
            return False
        time.sleep(POLL_S)
    if not signals.count:
        return False
    stop_all(engines, 0.0, lambda: True)
    return True


def find_cause(children: Sequence[Child]) -> Child:
    """The child that ended for a reason of its own, and not because another one was gone.

    Others may have ended before it. A rank that still runs although the others have lost one hangs: it is the cause.
    """
    started = time.monotonic()
    while (waited_s := time.monotonic() - started) < CAUSE_TIMEOUT_S:
        ended = [child for child in children if child.exit_code is not None]
        for child in ended:
            if child.exit_code not in (PEER_GONE_EXIT_CODE, RANK_LOST_EXIT_CODE, 0):
                return child
        lost = [child for child in ended if child.exit_code == RANK_LOST_EXIT_CODE]
        if lost and waited_s > SAME_MOMENT_S:
            running = [child for child in children if child.name.startswith(ENGINE_NAME) and child.exit_code is None]
            if not running:  # the cause is on another host
                return lost[0]
            if waited_s > LOST_TIMEOUT_S:
                return running[0]
        time.sleep(POLL_S)
    return next(child for child in children if child.exit_code is not None)


def failure_name(cause: Child, *, is_engine: bool) -> str:
    """The name of the failure in TGI's log (`docs/command-line.md`, 1)."""
    if not is_engine:
        return "WebserverFailed"
    return "ShardCannotStart" if cause.exit_code == START_FAILED_EXIT_CODE else "ShardFailed"
