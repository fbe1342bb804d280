"""`python -m server.chat.rendering`: renders chats with a model's chat templates, a frame for each.

A template is a program of its author's. jinja2's sandbox keeps it from files and processes, not from loops without end
or texts without limit, so that it runs in a process of its own, which has little memory and can be killed.
"""

from __future__ import annotations

import enum
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import msgspec

from server.chat.fitting import forms_of, with_end, without_nulls
from server.chat.template_engines import RaisedByTemplate, tgi_environment, transformers_environment
from server.chat.template_traits import TemplateTraits
from server.piped_process import prepare_child, read_frame, write_frame
from server.text.chat_format import DEFAULT, TOOL_USE

MAX_MEMORY = 1 << 30
"""Address space of this process, in bytes; a template that needs more fails."""
MAX_PROMPT_CHARS = 1 << 24
"""Characters of a prompt: many times those of the longest body."""
NULL = "None"
"""How a template prints null."""
MAX_REASON_CHARS = 2000
PROMPT, ERROR = range(2)
"""Kinds of answers; frames to this process are of the first kind."""
END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Stands behind the text that is to be continued while the template runs, so that nothing has to be searched for.

It is transformers' own, with the space that shows whether a template strips its texts.
"""


class Ending(enum.Enum):
    """The end of a prompt."""

    AUTOMATIC = "automatic"
    """CONTINUED if the last message is the assistant's, but without the white space at its end; else NEW."""
    NEW = "new"
    """The prompt ends where the assistant's next message begins."""
    CONTINUED = "continued"
    """The prompt ends with the last message, for the model to go on with."""
    CLOSED = "closed"
    """The prompt ends where the template ends the last message."""

    def is_within(self, role: str, *, has_content: bool, has_calls: bool) -> bool:
        """Whether the prompt ends within the last message, if that is of this kind, and the model goes on with it."""
        if self is Ending.AUTOMATIC:
            return role == "assistant" and has_content and not has_calls
        return self is Ending.CONTINUED


class TemplateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A model's templates and what is the same for all of its chats: the first frame."""

    templates: Mapping[str, str]
    """Sources by name; never empty."""
    special_tokens: Mapping[str, str]
    is_strict: bool


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one rendering needs."""

    messages: list[dict[str, Any]]
    """As TGI has them; or as sent, each with a content, which may be null, and arguments as JSON text."""
    tools: Sequence[dict[str, Any]] = ()
    tool_prompt: str = ""
    """Text for the end of the last message, if the template shows tools."""
    listed_prompt: str = ""
    """Text for the end of the last message, if the template does not show tools."""
    ending: Ending = Ending.AUTOMATIC
    variables: Mapping[str, Any] = {}
    """Further variables of the client's, by name; they cannot be `messages`, `tools` or `add_generation_prompt`."""


class RenderingError(Exception):
    """The text is the template's own, or the template engine's."""


class Renderer:
    """A model's templates. Each is compiled by its first chat: a bad one must not keep the server from starting."""

    def __init__(self, config: TemplateConfig) -> None:
        self._config = config
        self._compiled: dict[str, _Template] = {}

    def render(self, chat: Chat) -> str:
        """The prompt. Raises RenderingError."""
        try:
            prompt = self._template_for(chat).render(chat)
        except RenderingError:
            raise
        except Exception as error:  # a template is a program of its own: anything may come out of it
            raise RenderingError(self._explain(error)[:MAX_REASON_CHARS]) from None
        if len(prompt) > MAX_PROMPT_CHARS:
            raise RenderingError(f"invalid operation: the prompt is longer than {MAX_PROMPT_CHARS} characters")
        return prompt

    def _template_for(self, chat: Chat) -> _Template:
        config = self._config
        name = TOOL_USE if chat.tools and TOOL_USE in config.templates else DEFAULT
        if name not in config.templates:
            raise RenderingError("template not found")
        if name not in self._compiled:
            kind = _TgiTemplate if config.is_strict else _TransformersTemplate
            self._compiled[name] = kind(config.templates[name], config.special_tokens)
        return self._compiled[name]

    def _explain(self, error: Exception) -> str:
        """The template's own words; an error of the engine as minijinja prints it: kind, detail, line."""
        if isinstance(error, RaisedByTemplate) and not self._config.is_strict:
            return str(error)
        if isinstance(error, jinja2.TemplateSyntaxError):
            return f"syntax error: {error.message} (in <string>:{error.lineno})"
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), 1)
        return f"{_error_kind(error)}: {error} (in <string>:{line})"


def _error_kind(error: Exception) -> str:
    if isinstance(error, RaisedByTemplate):
        return "syntax error"
    return "undefined value" if isinstance(error, jinja2.UndefinedError) else "invalid operation"


class _Template(ABC):
    """One compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = self.environment()
        self.traits = TemplateTraits.of(environment.parse(source))
        self.special_tokens = special_tokens
        self._template = environment.from_string(source)

    @staticmethod
    @abstractmethod
    def environment() -> jinja2.Environment: ...

    @abstractmethod
    def render(self, chat: Chat) -> str:
        """The prompt. Raises RenderingError, and whatever the template does."""

    def run(self, variables: Mapping[str, Any]) -> str:
        """The template's output, no longer than matters."""
        prompt = ""
        for part in self._template.generate(variables):
            prompt += part
            if len(prompt) > MAX_PROMPT_CHARS:
                break
        return prompt

    def with_tool_prompt(self, chat: Chat) -> list[dict[str, Any]]:
        """The messages, the last of them with the text about tools behind its content."""
        text = chat.tool_prompt if self.traits.has_tools else chat.listed_prompt
        ended = with_end(chat.messages[-1], text) if text and chat.messages else None
        return chat.messages if ended is None else [*chat.messages[:-1], ended]


class _TgiTemplate(_Template):
    """A template as TGI renders it."""

    environment = staticmethod(tgi_environment)

    def render(self, chat: Chat) -> str:
        """The prompt. What stands behind the last words of an assistant's last message is cut: the model goes on."""
        messages = self.with_tool_prompt(chat)
        variables = {
            "messages": messages,
            "bos_token": self.special_tokens.get("bos_token"),
            "eos_token": self.special_tokens.get("eos_token"),
            "add_generation_prompt": True,
            "tools": list(chat.tools) or None,
        }
        prompt = self.run(variables)
        last = messages[-1] if messages else None
        index = prompt.rfind(last["content"]) if last and last["role"] == "assistant" else -1
        return prompt if last is None or index < 0 else prompt[: index + len(last["content"])].rstrip()


class _TransformersTemplate(_Template):
    """A template as transformers renders it."""

    environment = staticmethod(transformers_environment)

    def render(self, chat: Chat) -> str:
        """The prompt of the first form of the messages that the template takes; else the error of the first form."""
        first_error = None
        for messages in forms_of(self.with_tool_prompt(chat), self.traits):
            try:
                return self._unless_null_is_printed(self._render(messages, chat), messages, chat)
            except (RenderingError, RaisedByTemplate):
                raise
            except Exception as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _unless_null_is_printed(self, prompt: str, messages: list[dict[str, Any]], chat: Chat) -> str:
        """The prompt of empty texts, where all that a template does with a content that is null is to print `None`."""
        if NULL not in prompt or all(message["content"] is not None for message in messages):
            return prompt
        try:
            plain = self._render(without_nulls(messages), chat)
        except Exception:  # it takes null and no empty text
            return prompt
        return plain if plain.replace(NULL, "") == prompt.replace(NULL, "") else prompt

    def _render(self, messages: list[dict[str, Any]], chat: Chat) -> str:
        if _is_continued(chat):
            prompt = self._continued(messages, chat)
            if prompt is not None:
                return prompt
            if chat.ending is Ending.CONTINUED:
                raise RenderingError("the last message has no text to go on with")
        return self._run_for(chat, messages, has_generation_prompt=chat.ending in (Ending.AUTOMATIC, Ending.NEW))

    def _continued(self, messages: list[dict[str, Any]], chat: Chat) -> str | None:
        """The prompt up to the end of the last message's text; None: the template does not show that."""
        is_stripped = chat.ending is Ending.AUTOMATIC
        marked = with_end(messages[-1], END_MARK, is_stripped=is_stripped) if messages else None
        if marked is None:
            return None
        prompt = self._run_for(chat, [*messages[:-1], marked], has_generation_prompt=False)
        place = prompt.rfind(END_MARK.rstrip())
        if place < 0:
            return None
        is_whole = is_stripped or prompt.startswith(END_MARK, place)
        return prompt[:place] if is_whole else prompt[:place].rstrip()

    def _run_for(self, chat: Chat, messages: list[dict[str, Any]], *, has_generation_prompt: bool) -> str:
        names = {
            "messages": messages,
            "tools": list(chat.tools) or None,
            "add_generation_prompt": has_generation_prompt,
        }
        return self.run({"documents": None, **self.special_tokens, **chat.variables, **names})


def _is_continued(chat: Chat) -> bool:
    """Whether the model goes on with the last message."""
    if not chat.messages:
        return chat.ending is Ending.CONTINUED
    last = chat.messages[-1]
    has_content, has_calls = last["content"] is not None, "tool_calls" in last
    return chat.ending.is_within(last["role"], has_content=has_content, has_calls=has_calls)


def main() -> None:
    prepare_child(MAX_MEMORY)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(source)
    if first is None:
        return
    renderer = Renderer(msgspec.json.decode(first[1], type=TemplateConfig))
    while (frame := read_frame(source)) is not None:
        try:
            prompt = renderer.render(msgspec.json.decode(frame[1], type=Chat))
        except RenderingError as error:
            write_frame(target, str(error).encode(errors="replace"), ERROR)
        else:
            write_frame(target, prompt.encode(errors="surrogatepass"), PROMPT)


if __name__ == "__main__":
    main()
