"""The server's process: started on a private Unix socket, watched through its log, ended with its owner."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Mapping
from typing import IO

from pytgi import rooms
from pytgi.commands import USAGE_EXIT_CODE
from pytgi.errors import StartError
from pytgi.wire import UnixConnection

logger = logging.getLogger("pytgi")

POLL_S = 0.05
END_TIMEOUT_S = 15.0
"""The time of a server to end once it is asked to, or once its engine is gone."""
MAX_CONCURRENT_REQUESTS = "4096"
"""The server's limit unless the program sets another: whoever has the LLM may use it from many threads."""
STDERR = 2
NUM_LINES = 20
"""Lines of the log that are kept to name a cause."""
RESERVED_OPTIONS = {
    "model_id": "give the model as the first argument",
    "hostname": "the server listens on a private socket",
    "port": "the server listens on a private socket",
    "api_key": "nobody else reaches the server",
    "json_output": "the log goes to the logger `pytgi`",
}
"""Launcher flags that an LLM sets itself -> why, or what to do instead."""

_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def flags_of(options: Mapping[str, object]) -> list[str]:
    """Launcher flags for keyword arguments: True is a switch, None and False are left out, lists have commas."""
    flags = []
    for name, value in options.items():
        if name in RESERVED_OPTIONS:
            raise TypeError(f"{name} is no option of an LLM: {RESERVED_OPTIONS[name]}")
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            flags.append(f"{flag}={text}")
    return flags


def command_line(model: str, options: Mapping[str, object]) -> list[str]:
    """The server's flags. Its port is none, also where a variable names one: that is another server's."""
    return [f"--model-id={model}", *flags_of(options), "--json-output", "--port=0"]


def environment() -> dict[str, str]:
    """The server's variables: this program's, without the one that the launcher would take for the key to it."""
    environ = {**os.environ, **rooms.child_environ()}
    environ.pop("API_KEY", None)
    environ["MAX_CONCURRENT_REQUESTS"] = environ.get("MAX_CONCURRENT_REQUESTS") or MAX_CONCURRENT_REQUESTS
    return environ


class Server:
    """A running server. It belongs to the process that made it, and ends with it however that ends."""

    def __init__(self, model: str, options: Mapping[str, object]) -> None:
        """Start it, without waiting until it answers. Raises StartError, or TypeError for an option that is ours."""
        flags = command_line(model, options)
        self.owner_pid = os.getpid()
        self._folder = tempfile.mkdtemp(prefix="pytgi-")
        self.path = os.path.join(self._folder, "socket")
        try:
            with _listener() as listener:
                listener.bind(self.path)
                command = [sys.executable, "-P", "-m", "server.launcher.embedded", str(listener.fileno()), *flags]
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # the lifeline
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[listener.fileno()],
                    env=environment(),
                    start_new_session=True,  # Ctrl-C breaks requests off and leaves the server alone
                )
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise StartError(f"the server can't be started on {self.path}: {error}; TMPDIR moves it") from error
        assert self._process.stdout is not None
        self.log = Log(self._process.stdout)
        _servers.add(self)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Return once the socket is listened to. Raises StartError with what the log says."""
        while True:
            connection = UnixConnection(self.path)
            try:
                connection.connect()
                return
            except OSError:
                if not self.is_alive:
                    raise StartError(self.cause_of_end()) from None
                time.sleep(POLL_S)
            finally:
                connection.close()

    def cause_of_end(self) -> str:
        """The log's words about the end, which is waited for, and the signal if there was one."""
        try:
            code = self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "the server does not answer"
        if code < 0:
            return "\n".join([f"the server was ended by signal {-code}, {signal.strsignal(-code)}", *self.log.errors()])
        words = self.log.last_words() or f"the server ended with exit code {code} and said nothing"
        if code == USAGE_EXIT_CODE:  # what follows is for those who type commands
            words = words.partition("\n")[0].removeprefix("error: ")
        return words

    def stop(self) -> None:
        """End the server; in a process that was forked off its owner, leave it alone."""
        if os.getpid() != self.owner_pid:
            return
        self.let_go()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def let_go(self) -> None:
        """Close this process's end of the lifeline."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()


def _listener() -> socket.socket:
    """A Unix socket that is none of the child's standard streams, should some of this process's be closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first:
        return socket.socket(fileno=fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, STDERR + 1))


class Log:
    """The server's log, read on a thread: it goes to the logger `pytgi`, and its last lines are kept."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.latest = ""
        """The newest message."""
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=NUM_LINES)
        self._errors: deque[str] = deque(maxlen=NUM_LINES)
        self._reader = threading.Thread(target=self._read, name="pytgi-log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._stream:
            try:
                self._take(line.decode(errors="replace").rstrip())
            except Exception:  # of a handler that the program has; unless this goes on, the server waits for its log
                traceback.print_exc()

    def _take(self, line: str) -> None:
        try:
            record = json.loads(line)
            # What is said of a request goes to its caller as an exception, and is no cause of the server's end.
            level, message = "DEBUG" if "span" in record else record["level"], record["message"]
        except (ValueError, KeyError, TypeError):  # no line of the log: a usage error, or a library's own words
            level, message = "WARN", line
        if message:
            self.latest = message
            self._lines.append(message)
            if level == "ERROR":
                self._errors.append(message)
            logger.log(logging.getLevelNamesMapping().get(level, logging.INFO), "%s", message)

    def errors(self) -> list[str]:
        """The errors, once the server has ended."""
        self._wait_for_end()
        return list(self._errors)

    def last_words(self) -> str:
        """The errors, or what came last, once the server has ended."""
        return "\n".join(self.errors() or self._lines)

    def close(self) -> None:
        self._wait_for_end()
        if not self._reader.is_alive():
            self._stream.close()

    def _wait_for_end(self) -> None:
        """The reader is at the end once the server has ended, unless somebody else still holds the pipe."""
        if threading.current_thread() is not self._reader:  # where an unused LLM may be collected, too
            self._reader.join(1.0)


def _let_go_in_forked_child() -> None:
    for server in _servers:
        server.let_go()


# A forked child has a copy of the lifeline, and would keep the server alive beyond its owner.
os.register_at_fork(after_in_child=_let_go_in_forked_child)
