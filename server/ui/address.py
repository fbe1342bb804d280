"""Where people on the server's own host find its pages."""

from __future__ import annotations

import socket

EVERYWHERE = ("0.0.0.0", "::")


def page_address(listener: socket.socket) -> str | None:
    """The URL of the first page; None for a socket without a port, as a program's own server has."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    host, port = listener.getsockname()[:2]
    if host in EVERYWHERE:
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
