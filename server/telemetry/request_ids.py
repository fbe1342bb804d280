"""A request's id: the client's own (`X-Request-Id`) or one of ours, in the answer's header and in its log lines."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.telemetry.spans import set_request_id

HEADER = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""Ids that are taken over: they go into log lines as they are."""


class RequestIds:
    """Sends back the id of a request that has one. On OpenAI's routes, whose clients show it, every request gets one.

    An id that is too long or has other characters is as good as none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = _request_id(scope) if scope["type"] == "http" else None
        if request_id is None:
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        set_request_id(request_id)
        await self._app(scope, receive, send_with_id)


def _request_id(scope: Scope) -> str | None:
    given = Headers(scope=scope).get(HEADER, "")
    if _ID.fullmatch(given):
        return given
    return f"req_{uuid.uuid4().hex}" if scope["path"].startswith("/v1/") else None
