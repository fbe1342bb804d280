"""Tables of lazy "module:Class" entries, so that an entry's module is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import Any


def load_entry(entry: str) -> Any:
    """The class behind "module:Class"."""
    module, name = entry.split(":")
    return getattr(importlib.import_module(module), name)
