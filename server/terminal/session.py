"""A chat in turns: a person's message, the model's answer, calls of tools that the person answers in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, Protocol

from server.terminal.commands import run_command
from server.terminal.conversation import Conversation
from server.terminal.errors import ChatError, RefusedError
from server.terminal.reply import Call, Reply
from server.terminal.screen import Screen

Ask = Callable[[dict[str, Any]], Generator[dict[str, Any]]]
"""A request -> the events of its answer as they come. Raises ChatError."""


class Keyboard(Protocol):
    """Raises KeyboardInterrupt for Ctrl-C, and EOFError for Ctrl-D on an empty line."""

    def message(self) -> str:
        """A message or a command, of one line or several."""

    def result(self) -> str:
        """What a tool answers."""

    def without_echo(self) -> contextlib.AbstractContextManager[None]:
        """While the model writes: what is typed shows at the next prompt only."""


class Session:
    """A chat at a terminal."""

    def __init__(self, ask: Ask, conversation: Conversation, keyboard: Keyboard, screen: Screen) -> None:
        self._ask = ask
        self._conversation = conversation
        self._keyboard = keyboard
        self._screen = screen

    def talk(self) -> None:
        """Take turns until the person leaves."""
        with contextlib.suppress(EOFError):
            while True:
                try:
                    self._take_message(self._keyboard.message())
                except KeyboardInterrupt:
                    self._screen.remark("Ctrl-D or /quit leaves.")

    def _take_message(self, text: str) -> None:
        """A command, or else a turn. Raises EOFError for the command that leaves."""
        if text.startswith("/"):
            self._run_command(text)
        elif text.strip():
            self._take_turn(text)

    def _run_command(self, line: str) -> None:
        try:
            self._screen.say(run_command(line, self._conversation))
        except ChatError as error:
            self._screen.say(f"error: {error}")

    def _take_turn(self, text: str) -> None:
        """From a message to an answer without calls. A turn that ends without an answer leaves no trace."""
        messages = self._conversation.messages
        num_before = len(messages)
        messages.append({"role": "user", "content": text})
        try:
            while calls := self._read_answer():
                messages.extend(self._result_of(call) for call in calls)
        except KeyboardInterrupt:
            self._screen.remark("Stopped.")
        except ChatError as error:
            self._screen.say(f"error: {error}")
            if isinstance(error, RefusedError):
                self._screen.remark("/params, /system and /tools show what is sent along, /clear begins anew.")
        finally:
            is_gone = self._conversation.take_back(num_before)
        if is_gone:
            self._screen.remark("The message is no part of the conversation: arrow up brings it back.")

    def _read_answer(self) -> list[Call]:
        """Show an answer and keep it, also if it breaks off. Raises ChatError, and KeyboardInterrupt for Ctrl-C."""
        reply = Reply()
        is_whole = False
        try:
            with self._keyboard.without_echo(), contextlib.closing(self._ask(self._conversation.request)) as events:
                for event in events:
                    for kind, text in reply.take(event):
                        self._screen.show_piece(kind, text)
            is_whole = True
        finally:
            if not is_whole:
                reply.calls.clear()
            if is_whole or reply.text:
                self._conversation.messages.append(reply.message)
            self._screen.end_answer(reply)
        return list(reply.calls.values())

    def _result_of(self, call: Call) -> dict[str, Any]:
        """A message with what the person says that the tool answers. Raises KeyboardInterrupt for Ctrl-C and Ctrl-D."""
        self._screen.show_call(call)
        try:
            return {"role": "tool", "tool_call_id": call.id, "content": self._keyboard.result()}
        except EOFError:
            raise KeyboardInterrupt from None
