"""Calls of functions in what a model writes, piece by piece as it comes. Plain strings; knows no HTTP.

The format is the one that Qwen2.5's template asks for (hermes):
`<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>`. Nothing else counts as a call.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from server.chat.marks import CLOSE, OPEN
from server.text.detokenizer import overlap


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


ChatPiece = Content | CallStart | Arguments | Thought


class AnswerReader(ABC):
    """Reads one answer. The pieces are the same however the text is cut, apart from their own cuts."""

    num_calls: int

    @abstractmethod
    def push(self, text: str) -> list[ChatPiece]:
        """The pieces that the next part of the answer's text completes."""

    @abstractmethod
    def finish(self, *, is_cut: bool) -> list[ChatPiece]:
        """The last pieces. `is_cut`: the answer has reached its length, and the model had more to say."""


class CallReader(AnswerReader):
    """Reads the calls out of one answer."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        """Text that came and is in no piece yet."""

    def push(self, text: str) -> list[ChatPiece]:
        self._held += text
        pieces: list[ChatPiece] = []
        while self._read(pieces):
            pass
        return pieces

    @abstractmethod
    def _read(self, pieces: list[ChatPiece]) -> bool:
        """Move what is certain from `_held` to `pieces`. Returns whether there may be more."""


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_decode = msgspec.json.Decoder(_Call).decode

_CUT_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(\{.*)', re.DOTALL)
"""A call that lacks its end. Groups: the name as JSON, the arguments as far as they go."""


class FreeCallReader(CallReader):
    """Reads a model that may write what it likes.

    A call is reported once all of it is there and it is right: valid JSON, the name of an offered function, an object
    of arguments. Until then it is held back, for what is not right is content, to the last character. White space
    around calls belongs to neither. A call that reaches the answer's length is reported as far as it goes.
    """

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        """`max_calls`: everything after that many calls is dropped; None: there is no limit."""
        super().__init__()
        self._names = names
        self._max_calls = max_calls
        self._gap = ""
        """White space before an opening mark, while `_held` is what comes after that mark."""
        self._body: _JsonText | None = None
        """Follows `_held` after an opening mark; None outside of a call."""

    def finish(self, *, is_cut: bool) -> list[ChatPiece]:
        held, self._held = self._held, ""
        if self._is_full:
            return []
        if self._body is None:
            return [] if self.num_calls and not held.strip() else _content(held)
        body = held[: len(held) - overlap(held, CLOSE)]
        call = self._whole_call(body)
        if not call and is_cut:
            call = self._cut_call(body)
        return call or _content(self._gap + OPEN + held)

    @property
    def _is_full(self) -> bool:
        return self.num_calls == self._max_calls

    def _read(self, pieces: list[ChatPiece]) -> bool:
        if self._is_full:
            self._held = ""
            return False
        if self._body is None:
            return self._read_content(pieces)
        return self._read_call(self._body, pieces)

    def _read_content(self, pieces: list[ChatPiece]) -> bool:
        before, mark, after = self._held.partition(OPEN)
        num_certain = len(before) if mark else len(before) - overlap(before, OPEN)
        content = before[:num_certain].rstrip()
        pieces += _content(content)
        if not mark:
            self._held = before[len(content) :]
            return False
        self._gap, self._held, self._body = before[len(content) :], after, _JsonText()
        return True

    def _read_call(self, body: _JsonText, pieces: list[ChatPiece]) -> bool:
        """Take a call up to its closing mark. Text that cannot become a call any more is content."""
        held = self._held
        start = held.lstrip()
        if start and not start.startswith("{"):
            pieces += _content(self._gap + OPEN)
            self._body = None
            return True
        mark, position = body.find((OPEN, CLOSE), held)
        if mark is None:
            return False
        inside, self._held, self._body = held[:position], held[position + len(mark) :], None
        call = self._whole_call(inside) if mark == CLOSE else []
        if call:
            pieces += call
        elif mark == CLOSE:
            pieces += _content(self._gap + OPEN + inside + CLOSE)
        else:
            content = inside.rstrip()
            pieces += _content(self._gap + OPEN + content)
            self._gap, self._body = inside[len(content) :], _JsonText()
        return True

    def _whole_call(self, body: str) -> list[ChatPiece]:
        try:
            call = _decode(body)
        except (msgspec.DecodeError, RecursionError):
            return []
        arguments = bytes(call.arguments).decode()
        return self._call(call.name, arguments) if arguments.startswith("{") else []

    def _cut_call(self, body: str) -> list[ChatPiece]:
        match = _CUT_CALL.fullmatch(body)
        name = next((name for name in self._names if match and json.dumps(name, ensure_ascii=False) == match[1]), None)
        return self._call(name, match[2]) if match and name is not None else []

    def _call(self, name: str, arguments: str) -> list[ChatPiece]:
        if name not in self._names:
            return []
        index = self.num_calls
        self.num_calls += 1
        return [CallStart(index, name), Arguments(index, arguments)]


class ForcedCallReader(CallReader):
    """Reads a model that a grammar holds to the format, so that the arguments can be reported as they come.

    `header` matches the text before the arguments and has the function's name, as JSON, in its first group.
    """

    def __init__(self, header: re.Pattern[str], first: str = "") -> None:
        """`first`: the beginning of the arguments, if the header has swallowed it."""
        super().__init__()
        self._header = header
        self._first = first
        self._arguments: _JsonText | None = None

    def finish(self, *, is_cut: bool) -> list[ChatPiece]:
        return [] if self.num_calls else _content(self._held)

    def _read(self, pieces: list[ChatPiece]) -> bool:
        if self._arguments is None:
            match = self._header.search(self._held)
            if match is None:
                return False
            pieces.append(CallStart(self.num_calls, json.loads(match[1])))
            self.num_calls += 1
            self._held = self._first + self._held[match.end() :]
            self._arguments = _JsonText()
        end = self._arguments.end(self._held)
        text = self._held[:end]
        if text:
            pieces.append(Arguments(self.num_calls - 1, text))
        self._held = self._held[len(text) :]
        if end is None:
            self._arguments.restart()
            return False
        self._arguments = None
        return True


class _JsonText:
    """Follows a growing JSON text: what is inside a string, and where the first value ends."""

    def __init__(self) -> None:
        self._position = 0
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


def _content(text: str) -> list[ChatPiece]:
    return [Content(text)] if text else []
