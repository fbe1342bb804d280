"""The API key, and the web pages that may call. Both are checked before a body is read."""

from __future__ import annotations

import hmac
from collections.abc import Collection

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ErrorBody, UnauthorizedError, error_body_for
from server.operation import OperationFinder

VARY = "origin, access-control-request-method, access-control-request-headers"


class ApiKeyGuard:
    """Answers 401 to whoever asks for a protected operation without the key.

    It stands in `Authorization: Bearer KEY` or, but for `is_strict`, in `X-API-Key`. The body is empty, but under /v1
    it is the error object of the path; not with `is_strict`.
    """

    def __init__(self, app: ASGIApp, api_key: str, finder: OperationFinder, *, is_strict: bool) -> None:
        self._app = app
        self._api_key = api_key.encode()
        self._is_strict = is_strict
        self._finder = finder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_protected(scope) and not self._has_key(scope):
            await self._refusal(scope["path"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, path: str) -> Response:
        body = error_body_for(path, UnauthorizedError(), is_strict=self._is_strict)
        if isinstance(body, ErrorBody):
            return Response(status_code=401)
        return Response(msgspec.json.encode(body), 401, media_type="application/json")

    def _is_protected(self, scope: Scope) -> bool:
        operation = self._finder.find(scope["path"], scope["method"])
        return operation is not None and operation.is_protected(is_strict=self._is_strict)

    def _has_key(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = "" if self._is_strict else headers.get("x-api-key", "")  # where Anthropic's clients put it
        # Headers come in as latin-1. The comparison takes the same time for every wrong key.
        return hmac.compare_digest(key.strip().encode("latin-1"), self._api_key)


class CorsHeaders:
    """Lets pages of `origins` (empty: of any origin) read the answers, and answers every OPTIONS request itself.

    A page may send the headers that it asks for, its key among them. With `is_strict` it may send a content type only,
    as to TGI.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str], *, is_strict: bool) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._is_strict = is_strict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowed = self._allowed_origin(Headers(scope=scope).get("origin"))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["vary"] = VARY
                if allowed is not None:
                    headers["access-control-allow-origin"] = allowed
            await send(message)

        if scope["method"] == "OPTIONS":
            headers = None if self._is_strict else Headers(scope=scope).get("access-control-request-headers")
            preflight = {
                "access-control-allow-methods": "GET,POST",
                "access-control-allow-headers": headers or "content-type",
            }
            await Response(headers=preflight)(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _allowed_origin(self, origin: str | None) -> str | None:
        if not self._origins or "*" in self._origins:
            return "*"
        return origin if origin in self._origins else None
