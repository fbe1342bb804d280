"""Ranks as processes of their own, each at the other end of a pipe."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, Self


class RankProcesses:
    """Processes that answer whatever they are sent; a context manager that ends them."""

    def __init__(self, num_ranks: int, serve: Callable[..., None], *args: Any, timeout_s: float) -> None:
        """Each process calls `serve(rank, pipe, *args)`, a function of a module, until the pipe is closed.

        They are copies of one that has loaded the module, and with it torch, which takes seconds.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([serve.__module__])
        self._timeout_s = timeout_s
        self._ends = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs, *args), daemon=True)
            process.start()
            theirs.close()
            self._ends.append((ours, process))

    def ask(self, message: Any) -> list[Any]:
        """Send it to every rank; their answers. Raises the error of the first rank that has one."""
        for pipe, _ in self._ends:
            pipe.send(message)
        answers = []
        for rank, (pipe, _) in enumerate(self._ends):
            assert pipe.poll(self._timeout_s), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for pipe, process in self._ends:
            pipe.close()  # ends the process
            process.join(self._timeout_s)
            process.kill()
            process.close()
