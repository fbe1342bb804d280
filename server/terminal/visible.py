"""Text that others wrote, made safe for a terminal."""

from __future__ import annotations

import re

UNSAFE = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and end of line; with them escape sequences begin
    "\u2028\u2029"  # further ends of line
    "\u202a-\u202e\u2066-\u2069"  # they change the order in which neighbours are shown
    "\ud800-\udfff"  # halves of characters, which no encoding has
    "\U000e0000-\U000e007f]"  # invisible letters
)


def visible(text: str) -> str:
    r"""`text` with escapes, as Python writes them, in place of what would steer a terminal: `\x1b`, `\u202e`."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
