"""Where people on the server's own host find its pages."""

from __future__ import annotations

import socket

EVERYWHERE = ("0.0.0.0", "::")


def page_lines(listener: socket.socket) -> list[str]:
    """What a start says of the first page: nothing for a socket without a port, as a program's own server has."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return []
    host, port = listener.getsockname()[:2]
    if host in EVERYWHERE:
        host = "localhost"
    return [f"A page for browsers is at http://{f'[{host}]' if ':' in host else host}:{port}/"]
