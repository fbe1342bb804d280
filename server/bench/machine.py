"""The date and the machine of a benchmark, for its report."""

from __future__ import annotations

import datetime
import platform

from engine.link.processor import available_cores, processor_name


def now() -> str:
    """Date and time of day."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def machine() -> str:
    """The cores that this process may use, and the processor."""
    return f"{available_cores()} cores of {processor_name() or platform.machine()}"
