"""The error that ends a turn of a chat, a command, or the chat."""

from __future__ import annotations


class ChatError(Exception):
    """Something can't be done; the text says in one sentence what, and what to do next."""


class RefusedError(ChatError):
    """The server does not take what was sent; the text is its own."""
