"""Marks that models write around what is no plain text, in a text that is still growing."""

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
OPEN_THOUGHT = "<think>"
CLOSE_THOUGHT = "</think>"


def overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that `mark` begins with."""
    max_length = min(len(text), len(mark) - 1)
    return next((length for length in range(max_length, 0, -1) if text.endswith(mark[:length])), 0)


def split_at(mark: str, text: str) -> tuple[str, str, str]:
    """The text before `mark`, the mark, and the rest. While there is none, the rest is what may begin it."""
    if mark in text:
        return text.partition(mark)
    num_certain = len(text) - overlap(text, mark)
    return text[:num_certain], "", text[num_certain:]
