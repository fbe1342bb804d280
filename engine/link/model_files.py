"""Reading the files of a model's folder, which somebody else has written. Standard library only.

A folder may hold a fifo that nobody writes to, or a link to a device that never ends: none of them is opened.
"""

from __future__ import annotations

import stat
from pathlib import Path

from engine.link.errors import StartError

MAX_FILE_BYTES = 256 << 20
"""Largest file that is read whole. The largest tokenizers have about 40 MB."""


def read_file(path: Path) -> bytes | None:
    """The content of `path`; None: there is no such file. Raises StartError for what is no file of a usual size."""
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # opening a folder says what it is
            raise StartError(f"{path} is no regular file, or a link to none: fetch the model again")
        if status.st_size > MAX_FILE_BYTES:
            raise StartError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: fetch the model again")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)  # files of /proc have no size, and may not end
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StartError.of_file(path, error) from error
    if len(content) > MAX_FILE_BYTES:
        raise StartError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: fetch the model again")
    return content
