"""The number of asyncio tasks of a Python process, which it writes to a file when it gets SIGUSR2.

Python imports this module at its start where PYTHONPATH has this folder. `COUNTED_TASKS` is the folder of the files,
which are named by process id.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def write_count(number: int, frame: FrameType | None) -> None:
    """Count the tasks of the loop that runs in the main thread, where signals are handled."""
    asyncio = sys.modules.get("asyncio")
    count = 0 if asyncio is None else sum(not task.done() for task in asyncio.all_tasks())
    path = os.path.join(os.environ["COUNTED_TASKS"], str(os.getpid()))
    with open(f"{path}.new", "w") as file:
        file.write(str(count))
    os.replace(f"{path}.new", path)  # a reader never sees half of it


if "COUNTED_TASKS" in os.environ:
    signal.signal(signal.SIGUSR2, write_count)
