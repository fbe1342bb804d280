"""The answers to errors: one handler for each kind."""

from __future__ import annotations

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.errors import ERROR_KINDS, BodyError, ErrorBody, error_body_for, error_type, openai_status
from server.telemetry.spans import log_failure

MAX_PATH_CHARS = 200
"""Characters of an unknown path that its refusal tells again."""
FLAGS_OF_PATHS = dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), "--allow-runtime-lora-updating")
"""Path -> the flag without which nothing is there."""


def _is_plain(request: Request) -> bool:
    """Whether errors of the path are told as TGI tells them."""
    is_strict = request.app.state.service.config.is_strict_tgi
    return error_type(request.url.path, is_strict=is_strict) is ErrorBody


def _answer(request: Request, status: int, error: Exception) -> Response:
    if not _is_plain(request):
        status = openai_status(status)
    body = error_body_for(request.url.path, error, is_strict=request.app.state.service.config.is_strict_tgi)
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def _answer_known(request: Request, error: Exception) -> Response:
    log_failure(error)
    return _answer(request, ERROR_KINDS[type(error)].status, error)


async def _answer_unforeseen(request: Request, error: Exception) -> Response:
    # The error is not logged here: Starlette raises it again after this answer, and uvicorn logs it with its traceback.
    return _answer(request, 500, error)


async def _answer_body_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BodyError)
    log_failure(error)
    if not _is_plain(request):
        return _answer(request, error.status, error)
    return Response(str(error), error.status, headers={"content-type": "text/plain; charset=utf-8"})


async def _answer_routing_error(request: Request, error: Exception) -> Response:
    """404 and 405, whose body is empty, or under /v1 an error object, but for --strict-tgi.

    The methods in `allow` are sorted and have no spaces between them, as with TGI.
    """
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "")
    methods = ",".join(sorted(method.strip() for method in allowed.split(",")))
    if _is_plain(request):
        response = Response(status_code=error.status_code)
    elif methods:
        reason = f"{request.method} is not allowed here, only {methods}"
        response = _answer(request, 405, BodyError(405, reason, code="method_not_supported"))
    else:
        path = request.url.path
        reason = f"Unknown request URL: {request.method} {path[:MAX_PATH_CHARS]}"
        if path in FLAGS_OF_PATHS:
            reason += f", which is there if the server starts with {FLAGS_OF_PATHS[path]}"
        response = _answer(request, error.status_code, BodyError(error.status_code, reason, code="unknown_url"))
    if methods:
        response.headers["allow"] = methods
    return response


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client has left before its answer, so nobody reads this one."""
    return Response(status_code=400)


def install_error_handlers(app: FastAPI) -> None:
    for error_class in ERROR_KINDS:
        app.add_exception_handler(error_class, _answer_known)
    app.add_exception_handler(BodyError, _answer_body_error)
    app.add_exception_handler(HTTPException, _answer_routing_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unforeseen)
