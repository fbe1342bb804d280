"""What benchmarks write into documents: a part between two marks, and the name of the processor they ran on."""

from __future__ import annotations

import platform
from pathlib import Path


def with_part(document: str, begin: str, end: str, text: str) -> str:
    """The document with `text` between its marks `begin` and `end`. Raises ValueError if it lacks one."""
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the document has no {end if found_begin else begin}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def processor() -> str:
    """The processor's name, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
