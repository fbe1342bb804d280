"""Thoughts of reasoning models: whether an answer has one, and where it ends (`docs/reasoning.md`).

The format is that of QwQ, R1-Distill-Qwen and Qwen3: `<think>`, the thought, `</think>`, and then the answer. Where the
template has written the first mark, the answer begins within the thought.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

from server.chat.marks import CLOSE_THOUGHT, OPEN_THOUGHT
from server.chat.rendering import Ending
from server.chat.tool_calls import AnswerReader, ChatPiece, Content, Thought
from server.requests.messages import ContentBody, Message, TextPart
from server.text.detokenizer import overlap
from server.text.tokenizer import TextTokenizer


class Thinking(enum.Enum):
    """The place of a thought in an answer."""

    NONE = enum.auto()
    MAY_BEGIN = enum.auto()
    """The answer may begin with the mark of a thought."""
    HAS_BEGUN = enum.auto()
    """The answer begins within a thought."""


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
    if default is Thinking.NONE:
        return default
    continued = _continued_text(messages, ending)
    if continued:  # the client's words may have marks anywhere
        is_open = continued.rfind(OPEN_THOUGHT) > continued.rfind(CLOSE_THOUGHT)
        return Thinking.HAS_BEGUN if is_open else Thinking.NONE
    end = prompt.rstrip()
    if end.endswith(CLOSE_THOUGHT):
        return Thinking.NONE
    return Thinking.HAS_BEGUN if end.endswith(OPEN_THOUGHT) else default


def grammar_preface(thinking: Thinking, tokenizer: TextTokenizer) -> str:
    """Rules by which a model that is held to a grammar may think first; empty: it does not think."""
    if thinking is Thinking.NONE:
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


class ThinkingReader(AnswerReader):
    """Reads an answer that may begin with a thought, and hands what comes after it to another reader.

    White space around a thought is part of nothing. A thought that does not end is all of the answer.
    """

    def __init__(self, thinking: Thinking, after: AnswerReader) -> None:
        self._after = after
        self._is_open = thinking is Thinking.HAS_BEGUN
        self._held = ""
        """Text that came and is in no piece yet."""
        self._read: Callable[[list[ChatPiece]], bool] = self._read_beginning

    def push(self, text: str) -> list[ChatPiece]:
        self._held += text
        pieces: list[ChatPiece] = []
        while self._held and self._read(pieces):
            pass
        self._follow()
        return pieces

    def finish(self, *, is_cut: bool) -> list[ChatPiece]:
        held, self._held = self._held, ""
        is_within = self._read == self._read_thought
        thought = _thought(held.rstrip() if is_within else held.strip())
        pieces = thought if self._is_open else self._after.push(held)
        pieces += self._after.finish(is_cut=is_cut)
        self._follow()
        return pieces

    def _follow(self) -> None:
        self.num_calls, self.is_over = self._after.num_calls, self._after.is_over

    def _read_beginning(self, pieces: list[ChatPiece]) -> bool:
        start = self._held.lstrip()
        if start.startswith(OPEN_THOUGHT):
            self._is_open, self._held = True, start.removeprefix(OPEN_THOUGHT)
        elif OPEN_THOUGHT.startswith(start):  # it may become the mark
            return False
        self._read = self._read_indent if self._is_open else self._read_rest
        return True

    def _read_indent(self, pieces: list[ChatPiece]) -> bool:
        return self._skip_space(self._read_thought)

    def _read_thought(self, pieces: list[ChatPiece]) -> bool:
        thought, mark, rest = self._held.partition(CLOSE_THOUGHT)
        if mark:
            pieces += _thought(thought.rstrip())
            self._is_open, self._held, self._read = False, rest, self._read_gap
            return True
        certain = thought[: len(thought) - overlap(thought, CLOSE_THOUGHT)].rstrip()
        pieces += _thought(certain)
        self._held = thought[len(certain) :]
        return False

    def _read_gap(self, pieces: list[ChatPiece]) -> bool:
        return self._skip_space(self._read_rest)

    def _skip_space(self, then: Callable[[list[ChatPiece]], bool]) -> bool:
        self._held = self._held.lstrip()
        if self._held:
            self._read = then
        return bool(self._held)

    def _read_rest(self, pieces: list[ChatPiece]) -> bool:
        held, self._held = self._held, ""
        pieces += self._after.push(held)
        return False


class WordReader(AnswerReader):
    """Reads an answer that is words."""

    def push(self, text: str) -> list[ChatPiece]:
        return [Content(text)] if text else []

    def finish(self, *, is_cut: bool) -> list[ChatPiece]:
        return []


def _thought(text: str) -> list[ChatPiece]:
    return [Thought(text)] if text else []
