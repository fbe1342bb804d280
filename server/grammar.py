"""What a grammar on the wire becomes for the engine."""

from __future__ import annotations

from server.errors import ValidationError
from server.schemas import Grammar


async def compile_grammar(grammar: Grammar, *, is_strict: bool) -> str:
    """The text that llguidance reads. Raises ValidationError."""
    raise ValidationError("grammar is not supported")
