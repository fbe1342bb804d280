"""Texts that a model or a server may write in order to steer the terminal that shows them."""

from __future__ import annotations

HOSTILE = {
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "hyperlink": "\x1b]8;;http://example.invalid\x1b\\safe\x1b]8;;\x1b\\",
    "report": "\x1b[6n\x1b[21t\x1b[c\x05",
    "device control": "\x1bP$q q\x1b\\",
    "reset": "\x1bc",
    "other screen": "\x1b[?1049h",
    "other letters": "\x1b(0\x0e",
    "bracketed paste": "\x1b[201~\rrm\r",
    "8-bit sequence": "\x9b2J\x9d0;owned\x9c",
    "overwritten line": "harmless\rother",
    "backspaces": "harmless\x08\x08\x08",
    "further moves": "\x0b\x0c\x84\x85\x8d",
    "nothing": "\0\x7f\x80",
    "right to left": "\u202etxt.exe\u202c \u2066a\u2069",
    "lines": "a\u2028b\u2029c",
    "half a character": "\ud800\udfff",
    "invisible letters": "\U000e0001\U000e0041",
    "own style": "\x1b[2mmodel\x1b[0m",
}
