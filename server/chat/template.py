"""Chat messages to one prompt (`docs/wire.md`, 3.4).

The template engine behaves as TGI's (minijinja). Templates see tools as `transformers` shows them, which is what models
were trained on; with `--strict-tgi` they see what TGI shows (`docs/compatibility.md`, rows 17 and 30).
"""

from __future__ import annotations

import datetime
import enum
import functools
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.chat.tool_calls import CLOSE, OPEN
from server.errors import TemplateError
from server.requests.openai import ContentBody, Message, TextPart, ToolCall
from server.text.tokenizer import ChatFormat

_HTML_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", ord("'"): "\\u0027"}
_PRINTED = {True: "true", False: "false", None: "none"}


class _RaisedByTemplate(Exception):
    """`raise_exception(text)` was called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferedTools:
    """The part of a prompt that is about tools."""

    tools: Sequence[dict[str, Any]] = ()
    """The tools as the template gets them."""
    prompt: str = ""
    """Text for the end of the last message, if the template shows tools."""
    listed_prompt: str = ""
    """Text for the end of the last message, if the template does not show tools."""


class Ending(enum.Enum):
    """The end of a prompt."""

    AUTOMATIC = enum.auto()
    """CONTINUED if the last message is the assistant's, but without the white space at its end; else NEW."""
    NEW = enum.auto()
    """The prompt ends where the assistant's next message begins."""
    CONTINUED = enum.auto()
    """The prompt ends with the last message, for the model to go on with."""
    CLOSED = enum.auto()
    """The prompt ends where the template ends the last message."""


NO_TOOLS = OfferedTools()


class ChatTemplate:
    """A model's chat template."""

    def __init__(self, chat_format: ChatFormat, *, is_strict: bool = False) -> None:
        self._format = chat_format
        self._is_strict = is_strict

    def render(
        self, messages: Sequence[Message], offered: OfferedTools = NO_TOOLS, ending: Ending = Ending.AUTOMATIC
    ) -> str:
        """The prompt. Raises TemplateError."""
        if self._format.template is None:
            raise TemplateError("template not found")
        try:
            shown = self._shown(messages, offered)
            prompt = self._render_either(shown, offered, ending)
        except Exception as error:  # a template is a program of its own: anything may come out of it
            raise TemplateError(_explain(error)) from None
        content = shown[-1]["content"] if shown else None
        if ending is Ending.CONTINUED:
            return _continue_exactly(prompt, content)
        if ending is Ending.AUTOMATIC and content is not None and shown[-1]["role"] == "assistant":
            return _continue_last(prompt, content)
        return prompt

    def _shown(self, messages: Sequence[Message], offered: OfferedTools) -> list[dict[str, Any]]:
        """The messages as the template gets them."""
        if self._is_strict:
            shown = [{"role": message.role, "content": flatten_content(message)} for message in messages]
        else:
            is_called = "tool_calls" in self._source
            shown = [_with_calls(message) if is_called else _calls_as_text(message) for message in messages]
        text = offered.prompt if self._has_tools else offered.listed_prompt
        if text and messages and isinstance(messages[-1].body, ContentBody):
            shown[-1]["content"] += text
        return shown

    def _render_either(self, shown: list[dict[str, Any]], offered: OfferedTools, ending: Ending) -> str:
        """The prompt. Most templates need the arguments of a call as an object; some, as DeepSeek's, as JSON text."""
        try:
            return self._render(_parsed_arguments(shown), offered, ending)
        except TypeError:
            if not any("tool_calls" in message for message in shown):
                raise
            return self._render(shown, offered, ending)

    def _render(self, messages: list[dict[str, Any]], offered: OfferedTools, ending: Ending) -> str:
        return self._template.render(
            messages=messages,
            bos_token=self._format.bos_token,
            eos_token=self._format.eos_token,
            add_generation_prompt=ending in (Ending.AUTOMATIC, Ending.NEW),
            tools=list(offered.tools) or None,
        )

    @property
    def _source(self) -> str:
        assert self._format.template is not None
        source = self._format.template
        for training_mark in ("{% generation %}", "{% endgeneration %}"):
            source = source.replace(training_mark, "")
        return source

    @functools.cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        return _environment(_minijinja_json if self._is_strict else _transformers_json)

    @functools.cached_property
    def _has_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return "tools" in jinja2.meta.find_undeclared_variables(self._environment.parse(self._source))

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        # Compiled on the first chat: a template that does not compile must not keep the native routes from starting.
        return self._environment.from_string(self._source)


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


def _transformers_json(
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


def _continue_last(prompt: str, content: str) -> str:
    """The prompt without what the template put after the assistant's last words: the model goes on with them."""
    index = prompt.rfind(content)
    return prompt if index < 0 else prompt[: index + len(content)].rstrip()


def _continue_exactly(prompt: str, content: str | None) -> str:
    """The prompt as transformers cuts it: with the white space at the end, if the template keeps it."""
    words = (content or "").strip()
    index = prompt.rfind(words)
    if not words or index < 0:
        raise TemplateError("the last message has no text to go on with")
    kept = (content or "").lstrip()
    return prompt[: index + len(kept if prompt.startswith(kept, index) else words)]


def _with_calls(message: Message) -> dict[str, Any]:
    """A message as transformers passes it on: tool calls stay tool calls."""
    shown: dict[str, Any] = {"role": message.role, "content": _text(message)}
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": _called_function(call)} for call in message.tool_calls
        ]
    elif shown["content"] is None:
        shown["content"] = ""
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            shown[name] = value
    return shown


def _called_function(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = _transformers_json(arguments)
    return {"name": call.function.name, "arguments": arguments}


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


def _calls_as_text(message: Message) -> dict[str, Any]:
    """A message for a template that knows no tool calls: they become the text that the model would have written."""
    calls = (_called_function(call) for call in message.tool_calls)
    written = [
        f'{OPEN}\n{{"name": {_transformers_json(c["name"])}, "arguments": {c["arguments"]}}}\n{CLOSE}' for c in calls
    ]
    return {"role": message.role, "content": "\n".join(filter(None, [_text(message), *written]))}


def flatten_content(message: Message) -> str:
    """A message's content as TGI's one string: parts joined, images as Markdown, tool calls as JSON."""
    if not isinstance(message.body, ContentBody):
        return msgspec.json.encode([_tool_call(call) for call in message.body.tool_calls]).decode()
    return _joined(message.body)


def _text(message: Message) -> str | None:
    return _joined(message.body) if isinstance(message.body, ContentBody) else None


def _joined(body: ContentBody) -> str:
    if isinstance(body.content, str):
        return body.content
    return "".join(part.text if isinstance(part, TextPart) else f"![]({part.image_url.url})" for part in body.content)


def _tool_call(call: ToolCall) -> dict[str, Any]:
    # `arguments` becomes JSON text whatever it was; OpenAI clients send text already, and TGI quotes it once more
    arguments = msgspec.json.encode(call.function.arguments).decode()
    function = {"description": call.function.description, "name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}
