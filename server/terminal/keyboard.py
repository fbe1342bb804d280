"""What a person types: messages of several lines, with a history that is kept from run to run."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

MAX_HISTORY_BYTES = 1_000_000
"""Size of the file beyond which a start keeps the newer half."""


class TerminalKeyboard:
    """The terminal on standard input, as `server.terminal.session.Keyboard`."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str]) -> None:
        """Tab completes `words`."""
        self._messages: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_bindings(),
            history=open_history(environ),
            completer=WordCompleter(words, sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
        )
        self._results: PromptSession[str] = PromptSession("result> ", multiline=True, key_bindings=_bindings())

    def message(self) -> str:
        return self._messages.prompt()

    def result(self) -> str:
        return self._results.prompt()

    @contextlib.contextmanager
    def without_echo(self) -> Iterator[None]:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        quiet = termios.tcgetattr(terminal)
        # Keys reach the next prompt as it reads them itself: one by one, Enter as a carriage return. Ctrl-C stays what
        # it is, a signal.
        quiet[0] &= ~termios.ICRNL
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def _bindings() -> KeyBindings:
    """Enter sends, Alt-Enter and Ctrl-J begin a line, and so does Enter behind a backslash."""
    keys = KeyBindings()
    is_typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=is_typing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=is_typing)
    @keys.add("c-j", filter=is_typing)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class KeptHistory(FileHistory):
    """A file that may stop to be writable: the chat goes on without it."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def history_path(environ: Mapping[str, str]) -> Path:
    """`chat_history` in the folder for the state of programs."""
    state = environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "pytgi" / "chat_history"


def open_history(environ: Mapping[str, str]) -> History:
    """The history in its file, which only its owner may read; in memory if there can be no file."""
    try:
        path = history_path(environ)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.open("ab").close()  # a folder can be touched, too
        _shorten(path)
    except (OSError, RuntimeError):  # the latter without any home
        return InMemoryHistory()
    return KeptHistory(str(path))


def _shorten(path: Path) -> None:
    if path.stat().st_size > MAX_HISTORY_BYTES:
        newer = path.read_bytes()[-MAX_HISTORY_BYTES // 2 :]
        path.write_bytes(newer[max(newer.find(b"\n\n#"), 0) :])  # an empty line is before each entry
