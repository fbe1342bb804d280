"""Chats become prompts away from the event loop, one after the other, in a process of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from server.chat.rendering import Ending
from server.chat.template import NO_TOOLS, ChatTemplate, OfferedTools, template_config
from server.chat.template_process import TemplateProcess
from server.chat.template_traits import words_of
from server.errors import TemplateError
from server.requests.ignored import note_unread
from server.requests.messages import Message
from server.text.chat_format import ChatFormat

QUEUE_TIMEOUT_S = 10.0
"""Longest wait of a chat for those before it."""


class ChatRenderer:
    """A model's chat template, the thread that waits for it, and the process that renders with it."""

    def __init__(self, chat_format: ChatFormat, *, is_strict: bool, is_apart: bool) -> None:
        """Not `is_apart`: this process renders, which only templates that end may ask of it."""
        config = template_config(chat_format, is_strict=is_strict)
        self.process = None if config is None or not is_apart else TemplateProcess(config)
        render = None if self.process is None else self.process.render
        self._template = ChatTemplate(chat_format, is_strict=is_strict, render=render)
        self._words = frozenset(word for source in chat_format.templates.values() for word in words_of(source))
        """Words that a template may look at."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chats")

    async def render(
        self,
        messages: Sequence[Message],
        offered: OfferedTools = NO_TOOLS,
        ending: Ending = Ending.AUTOMATIC,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises ValidationError; TemplateError, also where the template takes too much time or memory."""
        note_unread(name for name in variables or () if name not in self._words)
        deadline = time.monotonic() + QUEUE_TIMEOUT_S

        def run() -> str:
            if time.monotonic() > deadline:
                raise TemplateError("the chats before this one take too long")
            return self._template.render(messages, offered, ending, variables)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def close(self) -> None:
        """End the process after the chat that it renders; those that wait are dropped."""
        if self.process is not None:
            self._thread.submit(self.process.close)
        self._thread.shutdown(wait=False)
