"""A request's spans: what its log lines and its traces call it, and the fields they share."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ERROR_KINDS, BodyError, logged_text
from server.operation import OperationFinder

logger = logging.getLogger(__name__)


class RequestSpans:
    """The names of a request's handler spans, the outermost first, and the fields of the innermost one."""

    def __init__(self, names: list[str], *, route: str | None = None, is_strict: bool = False) -> None:
        self.names = names
        self.fields: dict[str, str] = {}
        self.is_strict = is_strict
        self.own_fields: dict[str, str] = {} if route is None else {"route": route}
        """Fields that TGI's lines don't have: the route and, once it is known, the request's id."""


_current: ContextVar[RequestSpans | None] = ContextVar("request_spans", default=None)


class Tracer(Protocol):
    """A sender of spans; `server.telemetry.otlp` has ours."""

    def report(self, scope: Scope, spans: RequestSpans, started_ns: int, status: int) -> None: ...

    def close(self) -> None: ...


class SpansMiddleware:
    """Gives every request its spans and, once it has ended, tells the tracer about it."""

    def __init__(self, app: ASGIApp, tracer: Tracer | None, finder: OperationFinder, *, is_strict: bool) -> None:
        self._app = app
        self._tracer = tracer
        self._finder = finder
        self._is_strict = is_strict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        operation = self._finder.find(scope["path"], scope["method"])
        names = [] if operation is None or operation.span is None else [operation.span]
        spans = RequestSpans(names, route=operation.path if operation else None, is_strict=self._is_strict)
        token = _current.set(spans)
        try:
            if self._tracer is None:
                await self._app(scope, receive, send)
            else:
                await self._call_traced(self._tracer, spans, scope, receive, send)
        finally:
            _current.reset(token)

    async def _call_traced(
        self, tracer: Tracer, spans: RequestSpans, scope: Scope, receive: Receive, send: Send
    ) -> None:
        started_ns = time.time_ns()
        status = 500  # an exception that nobody foresaw is answered outside of this middleware

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            tracer.report(scope, spans, started_ns, status)


def begin_generation(*, is_stream: bool) -> None:
    """Open the inner span of `POST /`: there TGI calls another handler, which has a span of its own."""
    spans = _current.get()
    if spans is not None and spans.names == ["compat_generate"]:
        spans.names.append("generate_stream" if is_stream else "generate")


def set_request_id(request_id: str) -> None:
    """Name the request in its log lines."""
    spans = _current.get()
    if spans is not None:
        spans.own_fields["request_id"] = request_id


def set_fields(fields: Mapping[str, str]) -> None:
    """Add fields to the innermost span, for the traces."""
    spans = _current.get()
    if spans is not None:
        spans.fields.update(fields)


def log_extra(fields: Mapping[str, str] | None = None, own_fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `extra` of a log line about this request, from which `engine.link.logs` writes the spans and the fields.

    `own_fields` are not TGI's: a line under --strict-tgi does without them.
    """
    spans = _current.get()
    values: dict[str, Any] = dict(fields or {})
    if spans is None or not spans.is_strict:
        values |= {**(spans.own_fields if spans is not None else {}), **(own_fields or {})}
    if spans is None or not spans.names:
        return {"span": values} if values else {}
    *outer, name = spans.names
    return {"span": {"name": name, **values}, "outer_spans": [{"name": name} for name in outer]}


def log_failure(error: Exception) -> None:
    """Log one line. Only an exception that nobody foresaw gets a traceback, and only debug lines quote the client.

    A client's mistake is a warning, with TGI an error. TGI writes nothing of a body that it cannot read.
    """
    spans = _current.get()
    is_strict = spans is not None and spans.is_strict
    if isinstance(error, BodyError):
        if not is_strict:
            logger.warning("%s", logged_text(error), extra={**log_extra(), "kind": f"body {error.status}"})
            logger.debug("%s", error, extra=log_extra())
        return
    kind = ERROR_KINDS.get(type(error))
    if kind is not None:
        level = logging.WARNING if kind.is_clients_mistake and not is_strict else logging.ERROR
        logger.log(level, "%s", logged_text(error), extra={**log_extra(), "kind": kind.error_type})
        logger.debug("%s", error, extra=log_extra())
    else:
        logger.error("unexpected error", exc_info=error, extra=log_extra())
