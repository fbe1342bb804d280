"""Tables of lazy "module:Class" entries."""

from __future__ import annotations

import importlib
from typing import Any

from engine.link.errors import StartError


def import_entry(table: dict[str, str], key: str, what: str) -> Any:
    """The class behind a lazy "module:Class" entry. Raises StartError naming the known keys."""
    if key not in table:
        raise StartError(f"{what} {key!r} is not supported; supported: {', '.join(sorted(table))}")
    module, name = table[key].split(":")
    return getattr(importlib.import_module(module), name)
