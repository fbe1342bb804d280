"""The process of one part.

python -m benchmarks.gpu_proof.worker MODULE:FUNCTION SETTINGS FILE
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.settings import Settings


def main() -> None:
    entry, settings, path = sys.argv[1:]
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(Settings.load(settings), Report(Path(path)))


if __name__ == "__main__":
    main()
