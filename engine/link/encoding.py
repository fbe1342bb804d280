"""Text is UTF-8 in every process, whatever the locale says. Standard library only."""

from __future__ import annotations

import os
import sys

VARIABLE = "PYTHONUTF8"


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if the locale, or PYTHONIOENCODING, may have another encoding.

    Python chooses the encoding of texts and of files' names once, as it starts. Children get the mode by a variable.
    """
    os.environ[VARIABLE] = "1"
    is_chosen = os.environ.pop("PYTHONIOENCODING", None) is not None  # it would count before the mode
    if not sys.flags.utf8_mode and (is_chosen or sys.getfilesystemencoding() != "utf-8"):
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
