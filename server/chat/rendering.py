"""`python -m server.chat.rendering`: renders chats with one chat template, a frame for each.

A template is a program of its author's. jinja2's sandbox keeps it from files and processes, not from loops without end
or texts without limit, so that it runs in a process of its own, which has little memory and can be killed. The template
engine behaves as TGI's (minijinja).
"""

from __future__ import annotations

import datetime
import functools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.piped_process import prepare_child, read_frame, write_frame

MAX_MEMORY = 1 << 30
"""Address space of this process, in bytes; a template that needs more fails."""
MAX_PROMPT_CHARS = 1 << 24
"""Characters of a prompt: many times those of the longest body."""
MAX_REASON_CHARS = 2000
PROMPT, PROMPT_WITH_TOOLS, ERROR = range(3)
"""Kinds of answers; frames to this process are of the first kind."""

_HTML_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", ord("'"): "\\u0027"}
_PRINTED = {True: "true", False: "false", None: "none"}


class TemplateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A template and what is the same for all of its chats: the first frame."""

    source: str
    bos_token: str | None
    eos_token: str | None
    is_strict: bool


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one rendering needs."""

    messages: list[dict[str, Any]]
    """The messages as the template gets them, but for the arguments of calls, which are JSON text."""
    tools: Sequence[dict[str, Any]]
    tool_prompt: str
    """Text for the end of the last message, if the template shows tools."""
    listed_prompt: str
    """Text for the end of the last message, if the template does not show tools."""
    is_prompt_taken: bool
    """Whether the last message has a content that either text can follow."""
    has_generation_prompt: bool


class Rendered(msgspec.Struct, frozen=True):
    """A prompt, and whether its template shows tools."""

    prompt: str
    has_tools: bool


class RenderingError(Exception):
    """The text is the template engine's."""


class _RaisedByTemplate(Exception):
    """`raise_exception(text)` was called."""


class Renderer:
    """One compiled template."""

    def __init__(self, config: TemplateConfig) -> None:
        self._config = config

    def render(self, chat: Chat) -> Rendered:
        """Raises RenderingError."""
        try:
            prompt = self._render_either(chat)
        except Exception as error:  # a template is a program of its own: anything may come out of it
            raise RenderingError(_explain(error)[:MAX_REASON_CHARS]) from None
        if len(prompt) > MAX_PROMPT_CHARS:
            raise RenderingError(f"invalid operation: the prompt is longer than {MAX_PROMPT_CHARS} characters")
        return Rendered(prompt, self._has_tools)

    def _render_either(self, chat: Chat) -> str:
        """The prompt. Most templates need the arguments of a call as an object; some, as DeepSeek's, as JSON text."""
        text = chat.tool_prompt if self._has_tools else chat.listed_prompt
        messages = chat.messages
        if text and chat.is_prompt_taken:
            messages = [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + text}]
        try:
            return self._render(_parsed_arguments(messages), chat)
        except TypeError:
            if not any("tool_calls" in message for message in messages):
                raise
            return self._render(messages, chat)

    def _render(self, messages: list[dict[str, Any]], chat: Chat) -> str:
        parts = self._template.generate(
            messages=messages,
            bos_token=self._config.bos_token,
            eos_token=self._config.eos_token,
            add_generation_prompt=chat.has_generation_prompt,
            tools=list(chat.tools) or None,
        )
        prompt = ""
        for part in parts:
            prompt += part
            if len(prompt) > MAX_PROMPT_CHARS:
                break
        return prompt

    @functools.cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        return _environment(_minijinja_json if self._config.is_strict else transformers_json)

    @functools.cached_property
    def _has_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return "tools" in jinja2.meta.find_undeclared_variables(self._environment.parse(self._config.source))

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        # Compiled on the first chat: a template that does not compile must not keep the native routes from starting.
        return self._environment.from_string(self._config.source)


def _environment(to_json: Callable[..., str]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=False, lstrip_blocks=False, extensions=["jinja2.ext.loopcontrols"], finalize=_print_as_minijinja
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _print_as_minijinja(value: Any) -> Any:
    return _PRINTED[value] if value is None or isinstance(value, bool) else value


def transformers_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` of transformers: JSON as Python writes it, keys in their order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _minijinja_json(value: Any, indent: int | None = None) -> str:
    """minijinja's filter: keys sorted, no spaces unless indented, safe inside HTML."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, separators=separators, ensure_ascii=False, indent=indent)
    return text.translate(_HTML_ESCAPES)


def _raise_exception(text: str) -> NoReturn:
    raise _RaisedByTemplate(text)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _explain(error: Exception) -> str:
    """An error as minijinja prints it: kind, detail, line."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"syntax error: {error.message} (in <string>:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), 1)
    kind = "syntax error" if isinstance(error, _RaisedByTemplate) else _error_kind(error)
    return f"{kind}: {error} (in <string>:{line})"


def _error_kind(error: Exception) -> str:
    return "undefined value" if isinstance(error, jinja2.UndefinedError) else "invalid operation"


def _parsed_arguments(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of calls as objects; text that is no JSON stays as it is."""
    return [
        message | {"tool_calls": [_with_parsed(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in shown
    ]


def _with_parsed(call: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": call["function"] | {"arguments": arguments}}


def main() -> None:
    prepare_child(MAX_MEMORY)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(source)
    if first is None:
        return
    renderer = Renderer(msgspec.json.decode(first[1], type=TemplateConfig))
    while (frame := read_frame(source)) is not None:
        try:
            rendered = renderer.render(msgspec.json.decode(frame[1], type=Chat))
        except RenderingError as error:
            write_frame(target, str(error).encode(errors="replace"), ERROR)
        else:
            kind = PROMPT_WITH_TOOLS if rendered.has_tools else PROMPT
            write_frame(target, rendered.prompt.encode(errors="surrogatepass"), kind)


if __name__ == "__main__":
    main()
