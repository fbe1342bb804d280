"""The answers of a server that listens before it can serve: how far the start is, for people, probes and programs.

Then the application takes over, on the same connections.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.link.progress import Stage
from server.errors import StartingError, UnhealthyError, error_body_for
from server.ui.accept import prefers_html
from server.ui.pages import STARTING, page_files

PROBES = frozenset({"/", "/health", "/ping", "/readyz"})
RETRY_AFTER = {"retry-after": "5"}
"""Seconds. OpenAI's clients try twice again, and wait for so long in between."""


class StartState:
    """How far the start is."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self.take(Stage.FINDING)

    def take(self, stage: str, done: float | None = None, text: str = "") -> None:
        """Note the part of the stage that is done, 0 to 1 or None (nobody knows), and that in words."""
        self.stage, self.done, self.text = stage, done, text or stage.capitalize()

    def fields(self) -> dict[str, Any]:
        """What /readyz says beside the error."""
        elapsed_s = round(time.monotonic() - self._since, 1)
        return {"stage": self.stage, "progress": self.done, "message": self.text, "elapsed_s": elapsed_s}


class StartingApp:
    """Answers 503 to everybody, to browsers with a page, and 200 to /livez: nobody need start this server again."""

    def __init__(self, state: StartState, *, has_pages: bool) -> None:
        self._state = state
        self._has_pages = has_pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, is_read = scope["path"], scope["method"] in ("GET", "HEAD")
        answer = self._page(path, Headers(scope=scope)) if is_read and self._has_pages else None
        if answer is None:
            answer = Response() if is_read and path == "/livez" else self._refusal(path, is_read=is_read)
        await answer(scope, receive, send)

    def _page(self, path: str, headers: Headers) -> Response | None:
        """The page, or a file of a page; None: not asked for."""
        file = page_files().get(path.removeprefix("/ui/")) if path.startswith("/ui/") else None
        if file is not None and not file.is_page:
            return Response(file.body, headers=file.headers)
        if path.count("/") > 1 or not prefers_html(",".join(headers.getlist("accept"))):
            return None  # the page's own addresses are relative
        page = page_files()[STARTING]
        lasting = {name: value for name, value in page.headers.items() if name != "etag"}
        return Response(page.body, 503, headers={**lasting, **RETRY_AFTER, "cache-control": "no-store"})

    def _refusal(self, path: str, *, is_read: bool) -> Response:
        error = UnhealthyError() if is_read and path in PROBES else StartingError(self._state.text)
        body = msgspec.to_builtins(error_body_for(path, error, is_strict=False))
        if path == "/readyz":
            body |= self._state.fields()
        return Response(msgspec.json.encode(body), 503, media_type="application/json", headers=RETRY_AFTER)


class Gate:
    """Hands requests to one application until another one is there, which then lives as long as the server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._life = contextlib.AsyncExitStack()

    async def open(self, app: FastAPI) -> None:
        """Let `app` answer every request that begins from now on."""
        await self._life.enter_async_context(app.router.lifespan_context(app))
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._life.aclose()
        await send({"type": "lifespan.shutdown.complete"})
