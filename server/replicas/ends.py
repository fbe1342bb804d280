"""The last words to a client whose replica is gone: an answer, or the event that ends its stream."""

from __future__ import annotations

import msgspec

from engine.link.errors import GenerationError
from server.answers.openai import TgiStreamError, TgiStreamErrorBody
from server.answers.sse import DONE, event, named_event
from server.errors import (
    ERROR_KINDS,
    AnthropicErrorBody,
    ErrorBody,
    anthropic_error_body,
    error_body,
    error_body_for,
    error_type,
)


class ResponseError(msgspec.Struct, frozen=True, kw_only=True):
    """The event `error` of /v1/responses. The front does not know the response that `response.failed` would show."""

    type: str = "error"
    code: str
    message: str
    param: str | None = None


GONE = GenerationError("the replica that ran this request is gone")


def failed_answer(path: str, error: Exception, *, is_strict: bool) -> tuple[int, bytes]:
    """Status and body for a request to which no part of an answer has come."""
    return ERROR_KINDS[type(error)].status, msgspec.json.encode(error_body_for(path, error, is_strict=is_strict))


def end_of_stream(path: str, tail: bytes, *, is_strict: bool) -> bytes:
    """The end of a stream of events of this path, of which `tail` came last."""
    if path == "/invocations" and b'"object":"' in tail:
        path = "/v1/chat/completions"
    body = error_body(GONE)
    boundary = b"" if tail.endswith(b"\n\n") else b"\n\n"
    if path.startswith("/v1/") and is_strict:
        return boundary + event(TgiStreamErrorBody(TgiStreamError(body.error))) + DONE
    kind = error_type(path, is_strict=is_strict)
    if kind is ErrorBody:
        return boundary + event(body)
    if kind is AnthropicErrorBody:
        return boundary + named_event(anthropic_error_body(GONE))
    if path.startswith("/v1/responses"):
        return boundary + named_event(ResponseError(code="server_error", message=body.error))
    return boundary + event(error_body_for(path, GONE, is_strict=is_strict)) + DONE
