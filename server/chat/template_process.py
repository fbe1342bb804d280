"""The process that renders chats (`server.chat.rendering`), which can be killed where no thread can."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys

import msgspec

from server.chat.rendering import (
    ERROR,
    PROMPT_WITH_TOOLS,
    Chat,
    Rendered,
    RenderingError,
    TemplateConfig,
    read_frame,
    write_frame,
)

TIMEOUT_S = 5.0
"""Time of one rendering. Usual ones take less than a millisecond."""


class TemplateProcess:
    """Renders with one template in a process, started when it is first needed.

    A process that says nothing in time, or dies of a chat, gives way to a new one.
    """

    def __init__(self, config: TemplateConfig, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._config = config
        self.child: subprocess.Popen[bytes] | None = None

    def render(self, chat: Chat) -> Rendered:
        """Raises RenderingError. To be called by one thread."""
        answer = self._answer(msgspec.json.encode(chat))
        if answer is None:
            raise RenderingError("invalid operation: the template takes too long or too much memory")
        kind, data = answer
        text = data.decode(errors="surrogatepass")
        if kind == ERROR:
            raise RenderingError(text)
        return Rendered(text, has_tools=kind == PROMPT_WITH_TOOLS)

    def _answer(self, request: bytes) -> tuple[int, bytes] | None:
        """The answer to a chat; None: there is none in time."""
        child = self._started()
        assert child.stdin is not None and child.stdout is not None
        answer = None
        try:
            write_frame(child.stdin, request)  # it waits for nothing else: an answer late once ends it
            poll = select.poll()
            poll.register(child.stdout, select.POLLIN)
            if poll.poll(self.timeout_s * 1000):
                answer = read_frame(child.stdout)
        except BrokenPipeError:  # the child has died between two chats
            pass
        if answer is None:
            self.close()
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self.child is None or self.child.poll() is not None:
            self.close()
            command = [sys.executable, "-P", "-m", "server.chat.rendering"]
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self.child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                write_frame(self.child.stdin, msgspec.json.encode(self._config))
        return self.child

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            with contextlib.suppress(BrokenPipeError):  # what it has not read
                self.child.communicate()
            self.child = None
