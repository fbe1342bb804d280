"""A note in the log, at debug level, of what clients send and nobody reads; once for each name."""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

MAX_NAMES = 1_000
"""Names that are remembered; what comes beyond them is not told."""
MAX_SHOWN_CHARS = 100
_names: set[str] = set()


def note_ignored(names: Iterable[str]) -> None:
    """Tell of fields without effect. A name is a client's text: it is shortened and escaped."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    for name in names:
        shown = name[:MAX_SHOWN_CHARS]
        if shown not in _names and len(_names) < MAX_NAMES:
            _names.add(shown)
            logger.debug("a request has the field %s, which has no effect", ascii(shown))
