"""The process that renders chats (`server.chat.rendering`), which can be killed where no thread can."""

from __future__ import annotations

import msgspec

from server.chat.rendering import ERROR, PROMPT, Chat, RenderingError, TemplateConfig
from server.piped_process import HEAD, PipedProcess, has_answer, read_frame, write_frame

TIMEOUT_S = 5.0
"""Time of one rendering. Usual ones take less than a millisecond."""


class TemplateProcess(PipedProcess):
    """Renders chats with a model's templates in a process of its own.

    A process that says nothing in time, or dies of a chat, gives way to a new one.
    """

    def __init__(self, config: TemplateConfig, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        first = msgspec.json.encode(config)
        super().__init__("server.chat.rendering", greeting=HEAD.pack(PROMPT, len(first)) + first)

    def render(self, chat: Chat) -> str:
        """Raises RenderingError. To be called by one thread."""
        answer = self._answer(msgspec.json.encode(chat))
        if answer is None:
            raise RenderingError("invalid operation: the template takes too long or too much memory")
        kind, data = answer
        text = data.decode(errors="surrogatepass")
        if kind == ERROR:
            raise RenderingError(text)
        return text

    def _answer(self, request: bytes) -> tuple[int, bytes] | None:
        """The answer to a chat; None: there is none in time."""
        questions, answers = self.pipes()
        answer = None
        try:
            write_frame(questions, request, PROMPT)  # it waits for nothing else: an answer late once ends it
            if has_answer(answers, self.timeout_s):
                answer = read_frame(answers)
        except BrokenPipeError:  # the child has died between two chats
            pass
        if answer is None:
            self.close()
        return answer
