"""HTTP to a server on a Unix socket: one connection for each request. Knows JSON and events, and no route."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

from pytgi.errors import RequestError

OK = 200
EVENT_PREFIX = b"data:"
LAST_EVENT = b"[DONE]"


class UnixConnection(http.client.HTTPConnection):
    """A connection to the Unix socket at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


class Calls:
    """Requests that may be broken off together: the server then ends what it does for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[UnixConnection] = set()
        self._is_broken_off = False

    @contextlib.contextmanager
    def _connection(self, path: str) -> Iterator[UnixConnection]:
        connection = UnixConnection(path)
        try:
            with self._lock:
                if self._is_broken_off:
                    raise ConnectionError("the requests were broken off")
                connection.connect()
                self._open.add(connection)
            yield connection
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def break_off(self) -> None:
        with self._lock:
            self._is_broken_off = True
            for connection in self._open:
                if (sock := connection.sock) is None:  # the answer has announced the connection's end
                    continue
                with contextlib.suppress(OSError):  # it has ended by itself
                    sock.shutdown(socket.SHUT_RDWR)

    @property
    def is_broken_off(self) -> bool:
        return self._is_broken_off

    def get(self, path: str, route: str) -> bytes:
        """The body that a route answers. Raises as `post` does."""
        with self._connection(path) as connection:
            connection.request("GET", route)
            return _answer(connection).read()

    def post(self, path: str, route: str, body: dict[str, Any]) -> Any:
        """The JSON that a route answers. Raises RequestError, and OSError or HTTPException without a server."""
        with self._connection(path) as connection:
            _send(connection, route, body)
            return json.loads(_answer(connection).read())

    def stream(self, path: str, route: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events that a route answers, as they come. Raises as `post` does, also after some events."""
        with self._connection(path) as connection:
            _send(connection, route, body)
            for line in _answer(connection):
                data = line.removeprefix(EVENT_PREFIX).strip()
                if not line.startswith(EVENT_PREFIX) or data == LAST_EVENT:
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise error_of(OK, event)
                yield event


def _send(connection: UnixConnection, route: str, body: dict[str, Any]) -> None:
    connection.request("POST", route, json.dumps(body), {"content-type": "application/json"})


def _answer(connection: UnixConnection) -> http.client.HTTPResponse:
    response = connection.getresponse()
    if response.status == OK:
        return response
    text = response.read().decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = {"error": text, "error_type": "body"}  # what the body's reader refuses is told in plain text
    raise error_of(response.status, body)


def error_of(status: int, body: dict[str, Any]) -> RequestError:
    """The exception for TGI's error object, or OpenAI's."""
    error = body["error"]
    if isinstance(error, dict):
        return RequestError(error["message"], status, error.get("code") or error["type"], error.get("param"))
    return RequestError(error, status, body["error_type"])
