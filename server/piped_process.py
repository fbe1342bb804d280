"""Children of the HTTP process that answer over pipes, and what both ends have in common. The standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import struct
import subprocess
import sys
from typing import IO

HEAD = struct.Struct("<BQ")
"""Before each frame: its kind, and its length in bytes."""
PR_SET_PDEATHSIG = 1


class PipedProcess:
    """A child that runs a module, started when it is first needed. To be used by one thread, but for `kill`."""

    def __init__(self, module: str, *args: str, greeting: bytes = b"") -> None:
        """Each new child is sent the `greeting` first."""
        self.command = [sys.executable, "-P", "-m", module, *args]
        self._greeting = greeting
        self.child: subprocess.Popen[bytes] | None = None

    def pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """What the child reads and what it writes; a child that has died gives way to a new one."""
        if self.child is None or self.child.poll() is not None:
            self.close()
            self.child = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self.child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has died already: the first question will notice
                self.child.stdin.write(self._greeting)
                self.child.stdin.flush()
        assert self.child.stdin is not None and self.child.stdout is not None
        return self.child.stdin, self.child.stdout

    def kill(self) -> None:
        """End the child, even while another thread waits for its answer."""
        if (child := self.child) is not None:
            child.kill()

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None


def has_answer(stream: IO[bytes], timeout_s: float) -> bool:
    """Whether something can be read in time; however many descriptors there are, which `select` could not bear."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def read_frame(stream: IO[bytes]) -> tuple[int, bytes] | None:
    """The next frame and its kind; None: the stream has ended."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    kind, length = HEAD.unpack(head)
    data = stream.read(length)
    return (kind, data) if len(data) == length else None


def write_frame(stream: IO[bytes], data: bytes, kind: int) -> None:
    stream.write(HEAD.pack(kind, len(data)))
    stream.write(data)
    stream.flush()


def prepare_child(max_memory: int | None = None) -> None:
    """Begin as a child: end with the server, leave its signals to it, take `max_memory` bytes of address space at most.

    Nothing goes to the log: a panic or a traceback would show what clients wrote.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the server; a child ends with its input
        signal.signal(number, signal.SIG_IGN)
    if max_memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
