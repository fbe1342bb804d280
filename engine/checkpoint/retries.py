"""Fetching again while a network, or the server at its other end, fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

TRIES = 5
FIRST_PAUSE_S = 1.0
"""Pause before the second try; each further one is twice as long."""

T = TypeVar("T")


def is_transient_status(status: int) -> bool:
    """Whether an HTTP status says that the same request may be answered later."""
    return status >= 500 or status in (408, 429)


def with_retries(fetch: Callable[[], T], reason_to_retry: Callable[[Exception], str | None]) -> T:
    """`fetch()`, again after a pause while `reason_to_retry` has one; None: the error will not pass.

    Raises the last error.
    """
    pause_s = FIRST_PAUSE_S
    for number in range(2, TRIES + 1):
        try:
            return fetch()
        except Exception as error:
            reason = reason_to_retry(error)
            if reason is None:
                raise
            logger.warning("%s: trying again in %g s (try %d of %d)", reason, pause_s, number, TRIES)
        time.sleep(pause_s)
        pause_s *= 2
    return fetch()
