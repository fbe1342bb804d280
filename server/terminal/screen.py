"""What a chat writes on a terminal: answers as they come, thoughts and remarks dimmed."""

from __future__ import annotations

from typing import TextIO

from server.terminal.reply import Call, Kind, Reply
from server.terminal.visible import visible

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Screen:
    """Only what stands here reaches the terminal as an escape sequence; all else is made visible."""

    def __init__(self, out: TextIO, *, is_styled: bool) -> None:
        self._out = out
        self._is_styled = is_styled
        self._kind: Kind | None = None
        self._is_line_begun = False

    def show_piece(self, kind: Kind, text: str) -> None:
        """A piece of an answer. A thought begins with a word that says so, and ends with its line."""
        if kind is not self._kind:
            self.end_line()
            if kind is Kind.THOUGHT:
                self._write("thinking: ", is_dim=True)
        self._kind = kind
        self._write(text, is_dim=kind is Kind.THOUGHT)

    def end_answer(self, reply: Reply) -> None:
        self.end_line()
        self._kind = None
        if reply.token_times or reply.finish_reason:
            self.remark(f"[{reply.speed}]")
        if reply.finish_reason == "length":
            self.remark("The answer was cut at its limit of tokens: /params max_tokens=N sets another.")

    def show_call(self, call: Call) -> None:
        self.say(f"The model calls {call.name}({call.arguments})")

    def say(self, text: str) -> None:
        """Whole lines."""
        self.end_line()
        self._write(text + "\n")

    def remark(self, text: str) -> None:
        """Whole lines, dimmed."""
        self.end_line()
        self._write(text, is_dim=True)
        self.end_line()

    def end_line(self) -> None:
        if self._is_line_begun:
            self._write("\n")

    def _write(self, text: str, *, is_dim: bool = False) -> None:
        shown = visible(text)
        self._is_line_begun = not shown.endswith("\n")
        self._out.write(f"{DIM}{shown}{PLAIN}" if is_dim and self._is_styled else shown)
        self._out.flush()
