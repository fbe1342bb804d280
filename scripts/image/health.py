#!/usr/bin/env python3
"""The health check of our images: exit code 0 if the launcher, which is process 1, serves and its engine is well."""

from __future__ import annotations

import http.client
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 8.0
"""The Dockerfile allows 10 s, with the start of this program."""
PORT = re.compile(r"(?:--port|-p)(?:=|\0)(\d+)\0")


def port_of(command: str, default: str) -> int:
    """The port that a command line, whose words end with a zero byte, has the launcher listen on."""
    ports: Sequence[str] = PORT.findall(command)
    return int(ports[-1] if ports else default)


def main() -> None:
    port = port_of(Path("/proc/1/cmdline").read_text(), os.environ.get("PORT") or "3000")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except OSError as error:
        sys.exit(f"/health on port {port}: {error}")
    if status != http.client.OK:
        sys.exit(f"/health on port {port}: HTTP {status}")


if __name__ == "__main__":
    main()
