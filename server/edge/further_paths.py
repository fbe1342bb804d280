"""Further paths of routes, which somebody else chooses: Vertex AI says by variables where it asks."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from server.operation import OperationFinder


class FurtherPaths:
    """Lets a request for a further path count as one for its route, for the guard and the traces as well.

    A path that is a route already stays that route: whoever names /v1/chat/completions wants chats.
    """

    def __init__(self, app: ASGIApp, finder: OperationFinder, paths: Mapping[str, str]) -> None:
        self._app = app
        self._paths = {name: path for name, path in paths.items() if finder.find(name, "GET") is None}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in self._paths:
            path = self._paths[scope["path"]]
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)
