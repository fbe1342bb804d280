"""The tree of errors: its drawing and its table are complete."""

from __future__ import annotations

import inspect

import server.errors
from engine.link.errors import EngineDeadError, EngineHungError, GenerationError
from server.errors import ERROR_KINDS, BodyError


def test_every_error_is_drawn_and_has_a_status() -> None:
    errors = {
        error
        for _, error in inspect.getmembers(server.errors, inspect.isclass)
        if issubclass(error, Exception) and error.__module__ == server.errors.__name__
    } | {GenerationError, EngineDeadError, EngineHungError}
    assert ERROR_KINDS.keys() == errors - {BodyError}
    drawing = server.errors.__doc__ or ""
    assert all(f"─ {error.__name__} " in drawing for error in errors)
    assert drawing.count("─ ") == len(errors) + 1, "and the line above the engine's"
