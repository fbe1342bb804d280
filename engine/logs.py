"""Log lines of an engine process."""

from __future__ import annotations

import logging
import time


def configure_logging(level: str, process: str) -> None:
    """Human lines on stderr: time in UTC, level, which process, message."""
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=level.upper(),
        format=f"%(asctime)s.%(msecs)03dZ %(levelname)5s {process}: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        force=True,
    )
