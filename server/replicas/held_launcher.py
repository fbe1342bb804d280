"""The launcher as a child of a replica's actor: it ends with the actor, whose end its standard input tells."""

from __future__ import annotations

import logging
import sys

from engine.link.ipc import exit_when_closed
from server.launcher.main import main as launch

READY_LINE = "Ready, behind the front"
"""Not `Connected`, which scripts wait for and which the front says once all replicas are ready."""

if __name__ == "__main__":
    exit_when_closed(sys.stdin.fileno(), logging.getLogger("launcher").error)
    launch(ready_line=READY_LINE)
