"""`python -m server.launcher.embedded FD [flags]`: the launcher as the child of a program that uses it as a library.

It serves on the bound socket that it inherits as descriptor FD. The end of its standard input is the program's end, or
its wish: the running requests then have a short time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time

from server.launcher.main import main

DRAIN_S = 3.0
"""The time of the requests that run when the program is gone."""
STDIN = 0


def end_with_program() -> None:
    """Stop as by a signal once standard input ends, and by a second one after `DRAIN_S`.

    The kernel's parent-death signal would not do: it comes when the thread ends that has started this process.
    """
    while os.read(STDIN, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(DRAIN_S)
    os.kill(os.getpid(), signal.SIGTERM)


def remove_socket(path: str) -> None:
    """Remove the socket and its folder, which a program that was killed leaves behind."""
    with contextlib.suppress(OSError):  # the program has removed them
        os.unlink(path)
        os.rmdir(os.path.dirname(path))


if __name__ == "__main__":
    listener = socket.socket(fileno=int(sys.argv.pop(1)))
    path = listener.getsockname()
    threading.Thread(target=end_with_program, name="lifeline", daemon=True).start()
    try:
        main(listener)
    finally:
        remove_socket(path)
