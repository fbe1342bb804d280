"""`/` for browsers, which get a page there."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.ui.accept import prefers_html


class BrowserHome:
    """Lets a browser's request for `/` count as one for `page`. Everybody else gets TGI's answer."""

    def __init__(self, app: ASGIApp, page: str) -> None:
        """`page` is the path of a route."""
        self._app = app
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            if prefers_html(",".join(Headers(scope=scope).getlist("accept"))):
                scope = {**scope, "path": self._page, "raw_path": self._page.encode()}
        await self._app(scope, receive, send)
