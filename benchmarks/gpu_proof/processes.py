"""Work on all cores in forked processes, which inherit what can't be sent to them: kernels, closures."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")

_work: Callable[[int], Any]
"""The work of an index, as forked processes find it."""


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def in_processes(work: Callable[[int], Result], count: int, num_processes: int) -> Iterator[Result]:
    """The results of `work` for 0 to `count` - 1, in this order, each as soon as it and those before are there.

    A process that has used a card can't be forked and use it again.
    """
    global _work
    _work = work
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        yield from pool.map(_run, range(count))


def _run(index: int) -> Any:
    return _work(index)
