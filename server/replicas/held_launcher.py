"""The launcher as a child of a replica's actor: it ends with the actor, whose end its standard input tells."""

from __future__ import annotations

import logging
import sys

from engine.link.ipc import exit_when_closed
from server.launcher.main import main as launch

if __name__ == "__main__":
    exit_when_closed(sys.stdin.fileno(), logging.getLogger("launcher").error)
    launch()
