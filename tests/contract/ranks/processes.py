"""Ranks as processes of their own, which run what a test sends them."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from parallel import shared_memory
from parallel.shared_memory import SharedMemoryCollectives, memory_bytes
from parallel.state import Collectives
from parallel.torch_collectives import TorchCollectives
from tests.rank_processes import RankProcesses

SLOT_FLOATS = 64
"""Numbers in one turn, in place of a million, so that a few numbers take several turns."""
PARALLEL_FLOATS = 40
"""Numbers from which threads share a turn, in place of many thousands."""
TIMEOUT_S = 30.0
KINDS = ("shared memory", "shared memory, crowded", "gloo")

Work = Callable[..., Any]
"""A function of a module: collectives, rank, size and whatever the test passes -> something that can be pickled."""


class Processes(RankProcesses):
    """Ranks with collectives of every kind."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        """`backend` is what the kind "gloo" is made of, as torch takes it."""
        self.size = size
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._fds = [os.memfd_create(f"test-{crowded}") for crowded in range(2)]
        for fd in self._fds:
            os.ftruncate(fd, memory_bytes(size))
        paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in self._fds]
        super().__init__(size, _serve, size, self._store.port, paths, backend, timeout_s=2 * TIMEOUT_S)

    def run(self, kind: str, work: Work, *args: Any) -> list[Any]:
        """What `work` returns on each rank. Raises the error of the first rank that has one."""
        return self.ask((kind, work, args))

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for fd in self._fds:
            os.close(fd)


def _serve(rank: int, pipe: Connection, size: int, port: int, paths: list[str], backend: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    shared_memory.SLOT_FLOATS, shared_memory.PARALLEL_FLOATS = SLOT_FLOATS, PARALLEL_FLOATS
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
