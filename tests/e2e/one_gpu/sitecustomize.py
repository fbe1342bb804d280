"""A machine that pretends to have one GPU, for processes that find this folder in PYTHONPATH. Nothing is computed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class OneGpu(MetaPathFinder):
    """Lets torch see one GPU from the moment on in which the table of devices is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "engine.device":
            import torch

            torch.cuda.is_available = lambda: True
            torch.cuda.device_count = lambda: 1
            torch.cuda.set_device = lambda device: None
            torch.cuda.get_device_capability = lambda device=None: (8, 9)
        return PathFinder.find_spec(fullname, path, target) if fullname == "engine.device" else None


sys.meta_path.insert(0, OneGpu())
