"""Where the packages that serve are: `server`, `engine`, `parallel` and `quant`.

In a checkout they stand beside `pytgi`. The wheel has them in `pytgi/_rooms`, so that nobody's `server` or `engine`
meets ours in site-packages; a process that serves puts that folder first on its path.
"""

import os
import sys

PACKAGE = os.path.dirname(os.path.abspath(__file__))
INSTALLED = os.path.join(PACKAGE, "_rooms")
FOLDER = INSTALLED if os.path.isdir(INSTALLED) else os.path.dirname(PACKAGE)
"""The folder of the four packages."""
VARIABLE = "PYTHONPATH"


def put_first() -> None:
    """Let `import server` mean ours in this process, and in every process that it starts."""
    sys.path.insert(0, FOLDER)
    os.environ.update(child_environ())


def child_environ() -> "dict[str, str]":
    """The variable that lets `import server` mean ours in a child, whatever else is on its path.

    The child must be started with `-P`, or the folder that it starts in comes first.
    """
    # An empty entry stands for the folder that a process starts in.
    others = [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry and entry != FOLDER]
    return {VARIABLE: os.pathsep.join([FOLDER, *others])}
