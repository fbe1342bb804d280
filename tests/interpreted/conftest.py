"""Triton kernels run in Python on CPU tensors: a test process of its own (`pytest tests/interpreted`).

Triton reads the variable when a kernel is decorated, so it is set before any is imported.
"""

from __future__ import annotations

import os
import sys

if "triton" in sys.modules:
    raise RuntimeError("tests/interpreted needs a process of its own: Triton is already imported")
os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests.tiny_model import write_tiny_qwen2  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single layer, as steps cost by the layer here; not tied, so that random ids don't repeat themselves.

    The checkpoints of the oracles and the models with windows have more layers.
    """
    folder = tmp_path_factory.mktemp("single-layer")
    write_tiny_qwen2(folder, num_hidden_layers=1, is_tied=False)
    return folder
