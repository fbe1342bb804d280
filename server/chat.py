"""Chat messages to one prompt, rendered as TGI's template engine (minijinja) does it (reference 3.4)."""

from __future__ import annotations

import datetime
import functools
import json
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import TemplateError
from server.openai_schemas import ContentBody, Message, TextPart, ToolCall
from server.tokenizer import ChatFormat

_HTML_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", ord("'"): "\\u0027"}
_PRINTED = {True: "true", False: "false", None: "none"}


class _RaisedByTemplate(Exception):
    """`raise_exception(text)` was called."""


class ChatTemplate:
    """A model's chat template."""

    def __init__(self, chat_format: ChatFormat) -> None:
        self._format = chat_format

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, ending where the assistant shall go on. Raises TemplateError."""
        if self._format.template is None:
            raise TemplateError("template not found")
        flat = [{"role": message.role, "content": flatten_content(message)} for message in messages]
        try:
            prompt = self._render(flat)
        except Exception as error:  # a template is a program of its own: anything may come out of it
            raise TemplateError(_explain(error)) from None
        if flat and flat[-1]["role"] == "assistant":
            return _continue_last(prompt, flat[-1]["content"])
        return prompt

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self._template.render(
            messages=messages,
            bos_token=self._format.bos_token,
            eos_token=self._format.eos_token,
            add_generation_prompt=True,
            tools=None,
        )

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        # Compiled on the first chat: a template that does not compile must not keep the native routes from starting.
        assert self._format.template is not None
        source = self._format.template
        for training_mark in ("{% generation %}", "{% endgeneration %}"):
            source = source.replace(training_mark, "")
        return _environment().from_string(source)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=False, lstrip_blocks=False, extensions=["jinja2.ext.loopcontrols"], finalize=_print_as_minijinja
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _print_as_minijinja(value: Any) -> Any:
    return _PRINTED[value] if value is None or isinstance(value, bool) else value


def _to_json(value: Any, indent: int | None = None) -> str:
    """minijinja's filter: keys sorted, no spaces unless indented, safe inside HTML."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, separators=separators, ensure_ascii=False, indent=indent)
    return text.translate(_HTML_ESCAPES)


def _raise_exception(text: str) -> NoReturn:
    raise _RaisedByTemplate(text)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _explain(error: Exception) -> str:
    """As minijinja prints an error: kind, detail, where."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"syntax error: {error.message} (in <string>:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), 1)
    kind = "syntax error" if isinstance(error, _RaisedByTemplate) else _error_kind(error)
    return f"{kind}: {error} (in <string>:{line})"


def _error_kind(error: Exception) -> str:
    return "undefined value" if isinstance(error, jinja2.UndefinedError) else "invalid operation"


def _continue_last(prompt: str, content: str) -> str:
    """Cut what the template put after the assistant's last words, so that the model goes on with them."""
    index = prompt.rfind(content)
    return prompt if index < 0 else prompt[: index + len(content)].rstrip()


def flatten_content(message: Message) -> str:
    """A message's content as one string: parts joined, images as Markdown, tool calls as JSON."""
    if not isinstance(message.body, ContentBody):
        return msgspec.json.encode([_tool_call(call) for call in message.body.tool_calls]).decode()
    if isinstance(message.body.content, str):
        return message.body.content
    return "".join(
        part.text if isinstance(part, TextPart) else f"![]({part.image_url.url})" for part in message.body.content
    )


def _tool_call(call: ToolCall) -> dict[str, Any]:
    # `arguments` becomes JSON text whatever it was; OpenAI clients send text already, and TGI quotes it once more
    arguments = msgspec.json.encode(call.function.arguments).decode()
    function = {"description": call.function.description, "name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}
