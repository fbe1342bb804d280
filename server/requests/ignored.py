"""A note in the log, at debug level, of what clients send and nobody reads; once for each name."""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

MAX_LINES = 1_000
"""Lines that are remembered; what comes beyond them is not told."""
MAX_SHOWN_CHARS = 100
_lines: set[str] = set()


def note_ignored(names: Iterable[str]) -> None:
    """Tell of fields without effect."""
    _note("a request has the field %s, which has no effect", names)


def note_unread(names: Iterable[str]) -> None:
    """Tell of variables that the chat template does not look at."""
    _note("a request has %s for the chat template, which does not look at it", names)


def _note(text: str, names: Iterable[str]) -> None:
    """A name is a client's text: it is shortened and escaped."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    for name in names:
        line = text % ascii(name[:MAX_SHOWN_CHARS])
        if line not in _lines and len(_lines) < MAX_LINES:
            _lines.add(line)
            logger.debug("%s", line)
