"""Ranks as processes of their own, which run what a test sends them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from parallel import shared_memory
from parallel.shared_memory import SharedMemoryCollectives, memory_bytes
from parallel.state import Collectives
from parallel.torch_collectives import TorchCollectives

SLOT_FLOATS = 64
"""Numbers in one turn, in place of a million, so that a few numbers take several turns."""
TIMEOUT_S = 30.0
KINDS = ("shared memory", "shared memory, crowded", "gloo")

Work = Callable[..., Any]
"""A function of a module: collectives, rank, size and whatever the test passes -> something that can be pickled."""


class Processes:
    """Ranks with collectives of every kind; a context manager that ends them."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        """`backend` is what the kind "gloo" is made of, as torch takes it."""
        self.size = size
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._fds = [os.memfd_create(f"test-{crowded}") for crowded in range(2)]
        for fd in self._fds:
            os.ftruncate(fd, memory_bytes(size))
        paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in self._fds]
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = rank, size, self._store.port, paths, theirs, backend
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, kind: str, work: Work, *args: Any) -> list[Any]:
        """What `work` returns on each rank. Raises the error of the first rank that has one."""
        for pipe in self._pipes:
            pipe.send((kind, work, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(2 * TIMEOUT_S), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()  # ends the process
            process.join(TIMEOUT_S)
            process.kill()
            process.close()
        for fd in self._fds:
            os.close(fd)


def _serve(rank: int, size: int, port: int, paths: list[str], pipe: Connection, backend: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    shared_memory.SLOT_FLOATS = SLOT_FLOATS
    shared = [
        SharedMemoryCollectives(os.open(path, os.O_RDWR), rank, size, TIMEOUT_S, is_crowded=bool(crowded))
        for crowded, path in enumerate(paths)
    ]
    gloo = TorchCollectives(backend, TCPStore("127.0.0.1", port), rank, size, TIMEOUT_S)
    collectives: dict[str, Collectives] = dict(zip(KINDS, (*shared, gloo), strict=True))
    while True:
        try:
            kind, work, args = pipe.recv()
        except EOFError:
            os._exit(0)  # gloo would wait for the others
        try:
            pipe.send(work(collectives[kind], rank, size, *args))
        except BaseException as error:
            pipe.send(error)
