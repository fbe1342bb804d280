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
    """Gives every request an id for its log lines: the client's, else one of ours.

    It is sent back to a client that gave it, and on OpenAI's routes, whose clients show it. An id that is too long or
    has other characters is as good as none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        clients_id = Headers(scope=scope).get(HEADER, "")
        is_clients = _ID.fullmatch(clients_id) is not None
        request_id = clients_id if is_clients else f"req_{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        set_request_id(request_id)
        await self._app(scope, receive, send_with_id if is_clients or scope["path"].startswith("/v1/") else send)
