"""The process of one part.

python -m benchmarks.gpu_proof.worker MODULE:FUNCTION SETTINGS FILE
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from pathlib import Path

from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.settings import Settings

PR_SET_PDEATHSIG = 1


def main() -> None:
    # A proof that is killed must leave nothing behind that holds the card: this process leads a group of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: os.killpg(0, signal.SIGKILL))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    entry, settings, path = sys.argv[1:]
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(Settings.load(settings), Report(Path(path)))


if __name__ == "__main__":
    main()
