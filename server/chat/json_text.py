"""A growing JSON text: what is inside of a string, and where the first value ends."""

from __future__ import annotations


class JsonText:
    """Follows the text, piece by piece."""

    def __init__(self, start: int = 0) -> None:
        """`start`: the index in the text at which the JSON begins."""
        self._position = start
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def restart(self) -> None:
        """The part that was followed is no longer in the text, which goes on at index 0."""
        self._position = 0

    def find(self, marks: tuple[str, ...], text: str) -> tuple[str | None, int]:
        """The first of `marks` outside of strings and its index; None if there is none yet. Marks begin with "<"."""
        while self._position < len(text):
            if text[self._position] == "<" and not self._is_in_string:
                for mark in marks:
                    if text.startswith(mark, self._position):
                        return mark, self._position
                    if mark.startswith(text[self._position : self._position + len(mark)]):
                        return None, self._position  # it may become this mark
            self._step(text[self._position])
        return None, self._position

    def end(self, text: str) -> int | None:
        """The end of the object that `text` begins with; None while it is not complete."""
        while self._position < len(text):
            self._step(text[self._position])
            if self._depth == 0:
                return self._position
        return None

    def _step(self, character: str) -> None:
        self._position += 1
        if self._is_escaped:
            self._is_escaped = False
        elif self._is_in_string:
            self._is_escaped = character == "\\"
            self._is_in_string = character != '"'
        elif character == '"':
            self._is_in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
