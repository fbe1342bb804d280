"""What benchmarks write into documents: a part between two marks, and the name of the processor they ran on."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.link.processor import processor_name


def with_part(document: str, begin: str, end: str, text: str) -> str:
    """The document with `text` between its marks `begin` and `end`. Raises ValueError if it lacks one."""
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the document has no {end if found_begin else begin}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def processor() -> str:
    """The processor's name, as Linux has it."""
    return processor_name() or platform.machine()


def measured_on(num_cores: int, folder: str) -> str:
    """Where, with which model, when and by which command the figures below were taken."""
    today = datetime.datetime.now(datetime.UTC).date()
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"{num_cores} cores of {processor()}, {Path(folder).name}, {today}: `{command}`."


def print_and_write(lines: Sequence[str], document: Path | None, begin: str, end: str) -> None:
    """Print the lines, and put them between the marks of a document, if there is one. Raises as `with_part`."""
    print("\n".join(lines))
    if document is not None:
        document.write_text(with_part(document.read_text(), begin, end, "\n".join(lines)))
