"""Thoughts of reasoning models: whether an answer has one, and where it ends (`docs/reasoning.md`).

The format is that of QwQ, R1-Distill-Qwen and Qwen3: `<think>`, the thought, `</think>`, and then the answer. Where the
template has written the first mark, the answer begins within the thought.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from functools import partial

from server.chat.marks import CLOSE_THOUGHT, OPEN_THOUGHT, split_at
from server.chat.rendering import Ending
from server.requests.messages import ContentBody, Message, TextPart
from server.text.pieces import AnswerReader, Piece, Thought, words
from server.text.tokenizer import TextTokenizer


class Thinking(enum.Enum):
    """The place of a thought in an answer."""

    NONE = enum.auto()
    MAY_BEGIN = enum.auto()
    """The answer may begin with the mark of a thought."""
    HAS_BEGUN = enum.auto()
    """The answer begins within a thought."""
    IS_CONTENT = enum.auto()
    """The same, but nobody tells the thought from the answer: both are its words."""

    @property
    def is_apart(self) -> bool:
        """Whether thoughts are told from the answer."""
        return self in (Thinking.MAY_BEGIN, Thinking.HAS_BEGUN)


AUTO, OFF = "auto", "off"
PARSERS = {OFF: Thinking.NONE, "qwen3": Thinking.MAY_BEGIN, "deepseek_r1": Thinking.HAS_BEGUN}
"""Name of a parser -> what an answer begins with if its prompt does not end with a mark."""


def default_thinking(parser: str, tokenizer: TextTokenizer) -> Thinking:
    """What an answer begins with if its prompt does not end with a mark. `auto` looks whether the model knows marks."""
    if parser != AUTO:
        return PARSERS[parser]
    marks = (OPEN_THOUGHT, CLOSE_THOUGHT)
    is_shown = any(mark in source for source in tokenizer.chat_format.templates.values() for mark in marks)
    return Thinking.MAY_BEGIN if is_shown or tokenizer.token_ids(*marks) else Thinking.NONE


def thinking_after(prompt: str, messages: Sequence[Message], ending: Ending, default: Thinking) -> Thinking:
    """What the answer to `prompt`, which `messages` have become, begins with."""
    end = prompt.rstrip()
    is_within = end.endswith(OPEN_THOUGHT)
    unless_apart = Thinking.IS_CONTENT if is_within else Thinking.NONE
    if default is Thinking.NONE:
        return unless_apart
    continued = _continued_text(messages, ending)
    if continued:  # the client's words may have marks anywhere
        is_open = continued.rfind(OPEN_THOUGHT) > continued.rfind(CLOSE_THOUGHT)
        return Thinking.HAS_BEGUN if is_open else unless_apart
    if end.endswith(CLOSE_THOUGHT):
        return Thinking.NONE
    return Thinking.HAS_BEGUN if is_within else default


def grammar_preface(thinking: Thinking, tokenizer: TextTokenizer) -> str:
    """Rules by which a model that is held to a grammar may think first; empty: it does not think."""
    if not thinking.is_apart:
        return ""
    opening, closing = (tokenizer.token_id(mark) for mark in (OPEN_THOUGHT, CLOSE_THOUGHT))
    # A grammar knows a mark that is one token by its id alone.
    end = r"thought[lazy]: /(.|\n)*<\/think>/" if closing is None else rf"thought: /(.|\n)*/ <[{closing}]>"
    start = f'"{OPEN_THOUGHT}"' if opening is None else f"<[{opening}]>"
    preface = "thought SPACE" if thinking is Thinking.HAS_BEGUN else f"({start} thought SPACE)?"
    return f"preface: {preface}\n{end}\nSPACE: /\\n{{0,2}}/"  # with any number a model may go on for ever


def _continued_text(messages: Sequence[Message], ending: Ending) -> str:
    """The text that the model goes on with; empty if it begins a message."""
    last = messages[-1] if messages else None
    if last is None or not isinstance(last.body, ContentBody):
        return ""
    if not ending.is_within(last.role, has_content=True, has_calls=bool(last.tool_calls)):
        return ""
    content = last.body.content
    return content if isinstance(content, str) else "".join(part.text for part in content if isinstance(part, TextPart))


class ChatReader(AnswerReader):
    """Reads an answer that may begin with a thought; what comes after it is words.

    White space around a thought is part of nothing. A thought that does not end is all of the answer.
    """

    def __init__(self, *, thinking: Thinking = Thinking.NONE) -> None:
        self._held = ""
        """Text that came and is in no piece yet."""
        self.is_thinking = thinking is Thinking.HAS_BEGUN
        self._read: Callable[[list[Piece]], bool] = self._read_beginning if thinking.is_apart else self._read_answer
        """Moves what is certain from `_held` to the pieces. Returns whether there may be more."""

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._read(pieces):
            pass
        return pieces

    def finish(self, *, is_cut: bool) -> list[Piece]:
        if self._read == self._read_beginning:  # what might have become a mark is none
            self._begin()
        pieces = self.push("")
        return pieces + (_thought(self._held.rstrip()) if self.is_thinking else self._finish_answer(is_cut=is_cut))

    def _read_answer(self, pieces: list[Piece]) -> bool:
        """Read what comes after the thought."""
        pieces += words(self._held)
        self._held = ""
        return False

    def _finish_answer(self, *, is_cut: bool) -> list[Piece]:
        return []

    def _read_beginning(self, pieces: list[Piece]) -> bool:
        start = self._held.lstrip()
        if start.startswith(OPEN_THOUGHT):
            self.is_thinking, self._held = True, start.removeprefix(OPEN_THOUGHT)
        elif OPEN_THOUGHT.startswith(start):  # it may become the mark
            return False
        self._begin()
        return True

    def _begin(self) -> None:
        self._read = partial(self._skip_space, self._read_thought) if self.is_thinking else self._read_answer

    def _read_thought(self, pieces: list[Piece]) -> bool:
        thought, mark, rest = split_at(CLOSE_THOUGHT, self._held)
        certain = thought.rstrip()
        pieces += _thought(certain)
        if not mark:
            self._held = self._held[len(certain) :]
            return False
        self.is_thinking, self._held, self._read = False, rest, partial(self._skip_space, self._read_answer)
        return True

    def _skip_space(self, then: Callable[[list[Piece]], bool], pieces: list[Piece]) -> bool:
        self._held = self._held.lstrip()
        if self._held:
            self._read = then
        return bool(self._held)


def _thought(text: str) -> list[Piece]:
    return [Thought(text)] if text else []
