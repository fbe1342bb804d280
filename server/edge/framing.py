"""The frame of an answer on a connection that closes after it."""

from __future__ import annotations

from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def framed(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """`app`, whose answer says once that the connection closes, and has no chunks for a client of HTTP/1.0.

    There the end of the connection ends a body whose length is not known.
    """
    if cycle.keep_alive:
        return app

    async def run(scope: Any, receive: Any, send: Any) -> None:
        is_unframed = False

        async def send_framed(message: Any) -> None:
            nonlocal is_unframed
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                is_unframed = scope["http_version"] == "1.0" and b"content-length" not in names
                headers = [item for item in message["headers"] if item[0].lower() != b"connection"]
                message = {**message, "headers": headers}
                if is_unframed:
                    cycle.chunked_encoding = False
            elif is_unframed:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_framed)

    return run
