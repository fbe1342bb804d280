"""Triton kernels run in Python on CPU tensors: a test process of its own (`pytest tests/interpreted`).

Triton reads the variable when a kernel is decorated, so it is set before any is imported.
"""

from __future__ import annotations

import os
import sys

if "triton" in sys.modules:
    raise RuntimeError("tests/interpreted needs a process of its own: Triton is already imported")
os.environ["TRITON_INTERPRET"] = "1"
