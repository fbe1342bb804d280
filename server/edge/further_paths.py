"""Further paths of routes, which somebody else chooses: Vertex AI says by variables where it asks."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from server.operation import OperationFinder


class FurtherPaths:
    """Lets a request for a further path count as one for its route, for the guard and the traces as well.

    What a route of that very path answers stays that route's: whoever names /v1/chat/completions wants chats.
    """

    def __init__(self, app: ASGIApp, finder: OperationFinder, routes: Mapping[tuple[str, str], str]) -> None:
        """`routes` has a route's path for each method and further path."""
        self._app = app
        self._routes = {request: route for request, route in routes.items() if not _is_answered(finder, *request)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            route = self._routes.get((method, scope["path"]))
            if route is not None:
                scope = {**scope, "path": route, "raw_path": route.encode()}
        await self._app(scope, receive, send)


def _is_answered(finder: OperationFinder, method: str, path: str) -> bool:
    operation = finder.find(path, method)
    return operation is not None and (operation.method, operation.path) == (method, path)
