"""Fenced blocks of a Markdown file, and the comments that say how a test runs them (see CONTRIBUTING.md)."""

from __future__ import annotations

import dataclasses
import re

COMMAND_LANGUAGES = ("sh", "python", "js")
OTHER_LANGUAGES = ("text", "json", "yaml")
"""Every block names one of these languages, so that no command hides in a block without one."""

BLOCK = re.compile(r"^(?P<marker><!-- .*-->\n)?```(?P<language>.*)\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
MARKER = re.compile(r"^<!-- *(runnable|printed)", re.MULTILINE)
RUNNABLE = re.compile(r'<!-- runnable(, exit code (?P<exit_code>\d+)|, stopped at "(?P<stopped_at>[^"]+)")? -->')
PRINTED = "<!-- printed -->"


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """How a block is run and how it ends."""

    exit_code: int = 0
    stopped_at: str | None = None
    """The block is a server, which gets SIGTERM when its log has this text."""


@dataclasses.dataclass(slots=True)
class Block:
    document: str
    line: int
    language: str
    text: str
    run: Run | None
    printed: list[str] = dataclasses.field(default_factory=list)
    """Lines that its output must hold: those of the next block, if that is marked as printed."""

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]


def read_blocks(text: str, document: str) -> list[Block]:
    """Raises ValueError for a fence, a language or a marker that can't be understood."""
    blocks: list[Block] = []
    num_markers = 0
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        marker = (match["marker"] or "").strip()
        if match["language"] not in COMMAND_LANGUAGES + OTHER_LANGUAGES:
            raise ValueError(f"{document}:{line}: the block has no known language")
        num_markers += MARKER.match(marker) is not None
        if marker == PRINTED:
            if not blocks or blocks[-1].run is None:
                raise ValueError(f"{document}:{line}: no runnable block prints this")
            blocks[-1].printed += match["text"].splitlines()
        run = _read_marker(marker, f"{document}:{line}")
        blocks.append(Block(document, line, match["language"], match["text"], run))
    if num_markers != len(MARKER.findall(text)):
        raise ValueError(f"{document}: a marker stands before no block")
    if 2 * len(blocks) != sum(line.lstrip().startswith("```") for line in text.splitlines()):
        raise ValueError(f"{document}: a block is indented, or its fences don't match")
    return blocks


def _read_marker(marker: str, where: str) -> Run | None:
    if marker == PRINTED or not MARKER.match(marker):
        return None
    match = RUNNABLE.fullmatch(marker)
    if match is None:
        raise ValueError(f"{where}: {marker} can't be understood")
    return Run(exit_code=int(match["exit_code"] or 0), stopped_at=match["stopped_at"])
