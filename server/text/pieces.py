"""The pieces of an answer, in the order in which the model writes them, and whoever reads them out of its text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    """Counts the calls of one answer from 0."""
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next part of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """The next part of what a reasoning model thinks."""

    text: str


Piece = Content | CallStart | Arguments | Thought


class AnswerReader:
    """Reads one answer; this one takes all of it for words.

    The pieces are the same however the text is cut, apart from their own cuts.
    """

    num_calls = 0
    is_thinking = False
    """The text so far ends within a thought."""
    is_over = False
    """The model says nothing new from here on: its answer may end."""

    def push(self, text: str) -> list[Piece]:
        """The pieces that the next part of the answer's text completes."""
        return words(text)

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """The last pieces. `is_cut`: the answer has reached its length, and the model had more to say."""
        return []


def words(text: str) -> list[Piece]:
    return [Content(text)] if text else []
