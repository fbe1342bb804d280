"""Chat messages to one prompt (`docs/wire.md`, 3.4).

Templates see tools as `transformers` shows them, which is what models
were trained on; with `--strict-tgi` they see what TGI shows (`docs/compatibility.md`, rows 17 and 30).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.chat.rendering import Chat, Rendered, Renderer, RenderingError, TemplateConfig, transformers_json
from server.chat.tool_calls import CLOSE, OPEN
from server.errors import TemplateError
from server.requests.openai import ContentBody, Message, TextPart, ToolCall
from server.text.tokenizer import ChatFormat

Render = Callable[[Chat], Rendered]
"""Makes a prompt of a chat. Raises RenderingError."""


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

    def __init__(self, chat_format: ChatFormat, *, is_strict: bool = False, render: Render | None = None) -> None:
        """`render` does the work: a process of its own where the template may be anybody's; None: this one."""
        self._is_strict = is_strict
        config = template_config(chat_format, is_strict=is_strict)
        self._has_calls = config is not None and "tool_calls" in config.source
        self._do_render = None if config is None else render or Renderer(config).render

    def render(
        self, messages: Sequence[Message], offered: OfferedTools = NO_TOOLS, ending: Ending = Ending.AUTOMATIC
    ) -> str:
        """The prompt. Raises TemplateError. A template may take long: not for the event loop."""
        if self._do_render is None:
            raise TemplateError("template not found")
        shown = self._shown(messages)
        chat = Chat(
            messages=shown,
            tools=offered.tools,
            tool_prompt=offered.prompt,
            listed_prompt=offered.listed_prompt,
            is_prompt_taken=bool(messages) and isinstance(messages[-1].body, ContentBody),
            has_generation_prompt=ending in (Ending.AUTOMATIC, Ending.NEW),
        )
        try:
            rendered = self._do_render(chat)
        except RenderingError as error:
            raise TemplateError(str(error)) from None
        prompt = rendered.prompt
        content = shown[-1]["content"] if shown else None
        if content is not None and chat.is_prompt_taken:
            content += offered.prompt if rendered.has_tools else offered.listed_prompt
        if ending is Ending.CONTINUED:
            return _continue_exactly(prompt, content)
        if ending is Ending.AUTOMATIC and content is not None and shown[-1]["role"] == "assistant":
            return _continue_last(prompt, content)
        return prompt

    def _shown(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template gets them."""
        if self._is_strict:
            return [{"role": message.role, "content": flatten_content(message)} for message in messages]
        return [_with_calls(message) if self._has_calls else _calls_as_text(message) for message in messages]


def template_config(chat_format: ChatFormat, *, is_strict: bool) -> TemplateConfig | None:
    """The template as it is rendered; None: the model has none."""
    if chat_format.template is None:
        return None
    source = chat_format.template
    for training_mark in ("{% generation %}", "{% endgeneration %}"):
        source = source.replace(training_mark, "")
    return TemplateConfig(
        source=source, bos_token=chat_format.bos_token, eos_token=chat_format.eos_token, is_strict=is_strict
    )


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
        arguments = transformers_json(arguments)
    return {"name": call.function.name, "arguments": arguments}


def _calls_as_text(message: Message) -> dict[str, Any]:
    """A message for a template that knows no tool calls: they become the text that the model would have written."""
    calls = (_called_function(call) for call in message.tool_calls)
    written = [
        f'{OPEN}\n{{"name": {transformers_json(c["name"])}, "arguments": {c["arguments"]}}}\n{CLOSE}' for c in calls
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
