"""Calls of functions in what a model writes, piece by piece as it comes. Plain strings; knows no HTTP.

The format is the one that Qwen2.5's template asks for (hermes):
`<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>`. Besides, an answer counts that is
nothing but such objects without the marks (`server.chat.bare_calls`). What stands in a thought is no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

import msgspec

from server.chat.bare_calls import BareCalls
from server.chat.json_text import JsonText
from server.chat.marks import CLOSE, CLOSE_THOUGHT, OPEN, OPEN_THOUGHT, overlap, split_at
from server.chat.thoughts import ChatReader, Thinking
from server.text.pieces import Arguments, CallStart, Piece, words


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_decode = msgspec.json.Decoder(_Call).decode

_CUT_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(\{.*)', re.DOTALL)
"""A call that lacks its end. Groups: the name as JSON, the arguments as far as they go."""


class FreeCallReader(ChatReader):
    """Reads a model that may write what it likes.

    A call is reported once all of it is there and it is right: valid JSON, the name of an offered function, an object
    of arguments. Until then it is held back, for what is not right is content, to the last character. White space
    around calls belongs to neither. A call that reaches the answer's length is reported as far as it goes.
    """

    def __init__(
        self,
        names: Collection[str],
        max_calls: int | None = None,
        *,
        answered: Collection[str] | None = None,
        thinking: Thinking = Thinking.NONE,
    ) -> None:
        """`max_calls`: everything after that many calls is dropped; None: there is no limit.

        `answered`: calls without their marks that are none again (`server.chat.bare_calls`); None: none is a call.
        """
        super().__init__(thinking=thinking)
        self._names = names
        self._max_calls = max_calls
        self._gap = ""
        """White space before an opening mark, while `_held` is what comes after that mark."""
        self._body: JsonText | None = None
        """Follows `_held` after an opening mark; None outside of a call."""
        self._is_quoting = thinking is Thinking.IS_CONTENT
        """`_held` is within a thought among the words, which is content. Only who knows that it is in no call's text
        can tell where one begins."""
        self._bare = None if answered is None else BareCalls(names, answered)
        """Follows `_held` as long as nothing but thoughts stands before it and it may be bare calls."""

    def _finish_answer(self, *, is_cut: bool) -> list[Piece]:
        held = self._held
        if self._is_full:
            return []
        if self._bare is not None and not self._is_quoting:
            return self._finish_bare(self._bare, held, is_cut=is_cut)
        if self._body is None:
            return [] if self.num_calls and not held.strip() else words(held)
        body = held[: len(held) - overlap(held, CLOSE)]
        call = self._whole_call(body)
        if not call and is_cut:
            call = self._cut_call(body)
        return call or words(self._gap + OPEN + held)

    def _finish_bare(self, bare: BareCalls, held: str, *, is_cut: bool) -> list[Piece]:
        rest = held[bare.end :].strip()
        pieces = [piece for call in bare.calls[: self._max_calls] for piece in self._call(*call)]
        if rest and is_cut and not self._is_full:
            pieces += self._cut_call(rest)
        return pieces if pieces and (is_cut or self.is_over or not rest) else words(held)

    @property
    def _is_full(self) -> bool:
        return self.num_calls == self._max_calls

    def _read_answer(self, pieces: list[Piece]) -> bool:
        if self.is_over:
            return False
        if self._is_full:
            self._held = ""
            return False
        if self._is_quoting:
            return self._read_quoted_thought(pieces)
        if self._body is not None:
            return self._read_call(self._body, pieces)
        if self._bare is not None and not self._held.lstrip().startswith(OPEN_THOUGHT):
            if self._may_become_thought or self._bare.goes_on(self._held):
                self.is_over = self._bare.is_repeating
                return False
            self._bare = None
        return self._read_content(pieces)

    @property
    def _may_become_thought(self) -> bool:
        return OPEN_THOUGHT.startswith(self._held.lstrip())

    def _read_content(self, pieces: list[Piece]) -> bool:
        held = self._held
        # What is not found has the index -1, which becomes the end of the text.
        start, mark = min((held.find(mark) % (len(held) + 1), mark) for mark in (OPEN, OPEN_THOUGHT))
        is_found = start < len(held)
        if is_found and mark == OPEN_THOUGHT:
            self._is_quoting = True
            return True
        num_certain = start if is_found else len(held) - max(overlap(held, OPEN), overlap(held, OPEN_THOUGHT))
        content = held[:num_certain].rstrip()
        pieces += words(content)
        if not is_found:
            self._held = held[len(content) :]
            return False
        self._gap, self._held, self._body = held[len(content) : start], held[start + len(OPEN) :], JsonText()
        return True

    def _read_quoted_thought(self, pieces: list[Piece]) -> bool:
        thought, mark, self._held = split_at(CLOSE_THOUGHT, self._held)
        pieces += words(thought + mark)
        self._is_quoting = not mark
        return bool(mark)

    def _read_call(self, body: JsonText, pieces: list[Piece]) -> bool:
        """Take a call up to its closing mark. Text that cannot become a call any more is content."""
        held = self._held
        start = held.lstrip()
        if start and not start.startswith("{"):
            pieces += words(self._gap + OPEN)
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
            pieces += words(self._gap + OPEN + inside + CLOSE)
        else:
            content = inside.rstrip()
            pieces += words(self._gap + OPEN + content)
            self._gap, self._body = inside[len(content) :], JsonText()
        return True

    def _whole_call(self, body: str) -> list[Piece]:
        try:
            call = _decode(body)
        except (msgspec.DecodeError, RecursionError):
            return []
        arguments = bytes(call.arguments).decode()
        return self._call(call.name, arguments) if arguments.startswith("{") else []

    def _cut_call(self, body: str) -> list[Piece]:
        match = _CUT_CALL.fullmatch(body)
        name = next((name for name in self._names if match and json.dumps(name, ensure_ascii=False) == match[1]), None)
        return self._call(name, match[2]) if match and name is not None else []

    def _call(self, name: str, arguments: str) -> list[Piece]:
        if name not in self._names:
            return []
        index = self.num_calls
        self.num_calls += 1
        return [CallStart(index, name), Arguments(index, arguments)]


class ForcedCallReader(ChatReader):
    """Reads a model that a grammar holds to the format, so that the arguments can be reported as they come.

    `header` matches the text before the arguments and has the function's name, as JSON, in its first group. A call that
    was written before is not reported again: one is held back as long as it may become that, and ends the answer if it
    does.
    """

    def __init__(self, header: re.Pattern[str], first: str = "", *, thinking: Thinking = Thinking.NONE) -> None:
        """`first`: the beginning of the arguments, if the header has swallowed it."""
        super().__init__(thinking=thinking)
        self._header = header
        self._first = first
        self._arguments: JsonText | None = None
        self._name = ""
        """The name of the call that is being written, as JSON."""
        self._text = ""
        """Its arguments as far as they go."""
        self._is_reported = False
        self._calls: list[tuple[str, str]] = []
        """Names and arguments of the calls before."""

    def _finish_answer(self, *, is_cut: bool) -> list[Piece]:
        """What is cut before the arguments of the first call tells nobody anything: it is neither a call nor words."""
        return [] if self.num_calls or is_cut else words(self._held)

    def _read_answer(self, pieces: list[Piece]) -> bool:
        if self.is_over:
            return False
        if self._arguments is None:
            match = self._header.search(self._held)
            if match is None:
                return False
            self._name, self._text, self._is_reported = match[1], "", False
            self._held = self._first + self._held[match.end() :]
            self._arguments = JsonText()
        end = self._arguments.end(self._held)
        text, self._held = self._held[:end], self._held[end:] if end is not None else ""
        self._text += text
        if end is None:
            self._arguments.restart()
        self._report(text, pieces, is_whole=end is not None)
        if end is not None:
            self._arguments = None
            self.is_over = not self._is_reported
            self._calls.append((self._name, self._text))
        return end is not None

    def _report(self, text: str, pieces: list[Piece], *, is_whole: bool) -> None:
        """Report the call, or its next part, unless it may be one of those before."""
        if not self._is_reported:
            before = [call for name, call in self._calls if name == self._name]
            if self._text in before if is_whole else any(call.startswith(self._text) for call in before):
                return
            pieces.append(CallStart(self.num_calls, json.loads(self._name)))
            self.num_calls += 1
            self._is_reported, text = True, self._text
        if text:
            pieces.append(Arguments(self.num_calls - 1, text))
