"""The date and the machine of a benchmark, for its report."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from pathlib import Path


def now() -> str:
    """Date and time of day."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def machine() -> str:
    """The cores that this process may use, and the processor."""
    return f"{len(os.sched_getaffinity(0))} cores of {_processor()}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
