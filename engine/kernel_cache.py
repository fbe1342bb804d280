"""Numba's folder of compiled kernels: a full disk costs the next start its time and nothing else."""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)


def outlive_full_disk() -> None:
    """Let Numba go on with a kernel that it has compiled and can't write down; the log says so once."""
    from numba.core import caching

    save = caching.Cache.save_overload
    if hasattr(save, "__wrapped__"):
        return

    @functools.wraps(save)
    def save_if_possible(cache: Any, *args: Any) -> None:
        try:
            save(cache, *args)
        except OSError as error:
            _tell_once(error.strerror or str(error))

    caching.Cache.save_overload = save_if_possible


@functools.cache
def _tell_once(reason: str) -> None:
    logger.warning("Compiled kernels can't be kept (%s): the next start compiles them again", reason)
