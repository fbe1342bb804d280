"""The adapters that --lora-adapters names, in TGI's syntax: `name`, `name=source`, each with or without `@revision`."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from server.config import RESERVED_NAMES
from server.launcher.errors import ArgumentError

_ADAPTER = re.compile(r"([^=@]+)(?:=([^=@]+))?(?:@([^@]+))?")
FIX = "write NAME, NAME=SOURCE or NAME=SOURCE@REVISION; to a folder with , = or @ in its path make a link without"


class NamedAdapter(NamedTuple):
    """An adapter under the name by which requests choose it."""

    name: str
    source: str
    """A folder, or an id on the Hub."""
    revision: str | None


def parse_adapters(text: str | None, model_names: Collection[str] = ()) -> list[NamedAdapter]:
    """The adapters of the flag's value. Raises ArgumentError, also for a name that is the model's."""
    adapters: list[NamedAdapter] = []
    for part in (text or "").split(","):
        if not part.strip() and not text:
            continue
        match = _ADAPTER.fullmatch(part.strip())
        if match is None:
            raise ArgumentError(f"Invalid LoRA adapter format: {part}: {FIX}")
        name, source, revision = match.groups()
        if name in (*model_names, *RESERVED_NAMES, *(adapter.name for adapter in adapters)):
            raise ArgumentError(
                f"--lora-adapters {name}: that name is taken, give the adapter another, NAME={source or name}"
            )
        adapters.append(NamedAdapter(name, source or name, revision))
    return adapters
