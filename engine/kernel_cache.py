"""Numba's folder of compiled kernels: processes share it, and a full disk costs the next start its time, no more."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_WAIT_S = 120.0
"""For a process that compiles the same function. One that is stopped meanwhile holds up nobody for longer."""
POLL_S = 0.02


def share_kernels() -> None:
    """Let Numba compile a function in one process at a time, and go on with a kernel that it can't write down.

    Who waits for another process finds what that has compiled, and compiles what is lacking still. Numba lets all of
    them compile, and write the function's index at once: it can name for one kernel the file that has another's code.
    """
    from numba.core import caching, compiler_lock, dispatcher

    any_kernel: Any = dispatcher.Dispatcher
    save, compile_kernel = caching.Cache.save_overload, any_kernel.compile
    if hasattr(save, "__wrapped__"):
        return

    @functools.wraps(save)
    def save_if_possible(cache: Any, *args: Any) -> None:
        try:
            save(cache, *args)
        except OSError as error:
            _tell_once(error.strerror or str(error))

    @functools.wraps(compile_kernel)
    def compile_alone(kernel: Any, signature: Any) -> Any:
        # The compiler's own lock comes first: two threads that took the locks in different order would wait for ever.
        with compiler_lock.global_compiler_lock, _lock_of(kernel):
            return compile_kernel(kernel, signature)

    caching.Cache.save_overload = save_if_possible
    any_kernel.compile = compile_alone


@contextlib.contextmanager
def _lock_of(kernel: Any) -> Iterator[None]:
    """The lock of a function, a file beside its compiled kernels; none where there can't be one."""
    folder = kernel._cache.cache_path
    descriptor = None if folder is None else _open_lock(Path(folder), kernel.py_func)
    if descriptor is None:
        yield
        return
    try:
        _wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _open_lock(folder: Path, function: Any) -> int | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{function.__module__}.{function.__qualname__}.lock"
        return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return None


def _wait_for_lock(descriptor: int) -> None:
    """Go on without it after MAX_WAIT_S, and where the file system has no locks."""
    deadline = time.monotonic() + MAX_WAIT_S
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(POLL_S)
        except OSError:
            return


@functools.cache
def _tell_once(reason: str) -> None:
    logger.warning("Compiled kernels can't be kept (%s): the next start compiles them again", reason)
