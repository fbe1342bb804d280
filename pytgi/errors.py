"""The exceptions of the Python API.

PytgiError
 ├─ StartError         the server did not start
 ├─ ServerDiedError    the server has ended, by itself or because somebody ended it
 └─ RequestError       the server refuses a request, or fails to answer it
"""

from __future__ import annotations


class PytgiError(Exception):
    """Any failure of a server or of its requests."""


class StartError(PytgiError):
    """The text is what the server's log says about the cause."""


class ServerDiedError(PytgiError):
    """The text is what the server's log says about the cause."""


class RequestError(PytgiError):
    """A request has no answer. The text, `status` and `error_type` are those that HTTP clients of the route see."""

    def __init__(self, text: str, status: int, error_type: str, param: str | None = None) -> None:
        """`param` is the parameter that is refused, where the server names it."""
        super().__init__(text)
        self.status = status
        self.error_type = error_type
        self.param = param
