"""Marks that models write around what is no plain text."""

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
OPEN_THOUGHT = "<think>"
CLOSE_THOUGHT = "</think>"
