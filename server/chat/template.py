"""Chat messages to one prompt (`docs/wire.md`, 3.4).

Templates see messages and tools as `transformers` shows them, which is what models were trained on; with `--strict-tgi`
they see what TGI shows (`docs/compatibility.md`, rows 17 and 30).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.chat.rendering import Chat, Ending, Renderer, RenderingError, TemplateConfig
from server.chat.template_engines import transformers_json
from server.errors import TemplateError, ValidationError
from server.requests.messages import ContentBody, ImagePart, ImageUrl, Message, Part, TextPart, ToolCall
from server.text.chat_format import ChatFormat

Render = Callable[[Chat], str]
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


NO_TOOLS = OfferedTools()


class ChatTemplate:
    """A model's chat template."""

    def __init__(self, chat_format: ChatFormat, *, is_strict: bool = False, render: Render | None = None) -> None:
        """`render` does the work: a process of its own where the template may be anybody's; None: this one."""
        self._shown = _as_tgi if is_strict else _as_transformers
        config = template_config(chat_format, is_strict=is_strict)
        self._do_render = None if config is None else render or Renderer(config).render

    def render(
        self,
        messages: Sequence[Message],
        offered: OfferedTools = NO_TOOLS,
        ending: Ending = Ending.AUTOMATIC,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises TemplateError, ValidationError. A template may take long: not for the event loop.

        `variables`: what else the template may look at, by name.
        """
        if self._do_render is None:
            raise TemplateError("template not found")
        has_end = bool(messages) and isinstance(messages[-1].body, ContentBody)
        chat = Chat(
            messages=_with_text_at_end([self._shown(message, number) for number, message in enumerate(messages)]),
            tools=offered.tools,
            tool_prompt=offered.prompt if has_end else "",
            listed_prompt=offered.listed_prompt if has_end else "",
            ending=ending,
            variables=variables or {},
        )
        try:
            return self._do_render(chat)
        except RenderingError as error:
            raise TemplateError(str(error)) from None


def template_config(chat_format: ChatFormat, *, is_strict: bool) -> TemplateConfig | None:
    """The templates as they are rendered; None: the model has none."""
    if not chat_format.templates:
        return None
    templates = chat_format.templates
    if is_strict:
        templates = {name: _without_training_marks(source) for name, source in templates.items()}
    return TemplateConfig(templates=templates, special_tokens=chat_format.special_tokens, is_strict=is_strict)


def _without_training_marks(source: str) -> str:
    return source.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def _as_tgi(message: Message, number: int) -> dict[str, Any]:
    return {"role": message.role, "content": flatten_content(message)}


def _as_transformers(message: Message, number: int) -> dict[str, Any]:
    """A message as its client sent it, with what the server has read in place of what it read it from."""
    read: dict[str, Any] = {"content": _content(message, number)}
    if message.tool_calls:
        read["tool_calls"] = [_call(call) for call in message.tool_calls]
    sent = {key: read.get(key, value) for key, value in message.sent.items() if key in read or _is_kept(key, value)}
    return sent | read


def _is_kept(key: str, value: Any) -> bool:
    """Whether a template gets a key as it was sent; of calls and refusals it gets what was read."""
    return value is not None and key not in ("tool_calls", "refusal")


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = transformers_json(arguments)
    shown = {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
    return {key: value for key, value in shown.items() if value is not None}


def _with_text_at_end(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages; a last one of the assistant that says nothing has an empty text to go on from."""
    last = messages[-1] if messages else {}
    is_silent = last.get("role") == "assistant" and last["content"] is None and "tool_calls" not in last
    return [*messages[:-1], last | {"content": ""}] if is_silent else messages


def _content(message: Message, number: int) -> str | list[dict[str, str]] | None:
    """The content of the message of that number. Raises ValidationError for one that the model can't read."""
    if not isinstance(message.body, ContentBody):
        return None
    if isinstance(message.body.content, str):
        return message.body.content
    return [_text_part(part, number) for part in message.body.content]


def _text_part(part: Part, number: int) -> dict[str, str]:
    if not isinstance(part, TextPart):
        text = f"this model reads text only, it cannot take a part of type `{part.type}`"
        raise ValidationError(f"messages[{number}]: {text}", param=f"messages[{number}]")
    return {"type": "text", "text": part.text}


def flatten_content(message: Message) -> str:
    """A message's content as TGI's one string: parts joined, images as Markdown, tool calls as JSON."""
    if not isinstance(message.body, ContentBody):
        return msgspec.json.encode([_tool_call(call) for call in message.body.tool_calls]).decode()
    content = message.body.content
    return content if isinstance(content, str) else "".join(map(_as_markdown, content))


def _as_markdown(part: Part) -> str:
    match part:
        case TextPart(text=text):
            return text
        case ImagePart(image_url=ImageUrl(url=url)):
            return f"![]({url})"
    return ""


def _tool_call(call: ToolCall) -> dict[str, Any]:
    # `arguments` becomes JSON text whatever it was; OpenAI clients send text already, and TGI quotes it once more
    arguments = msgspec.json.encode(call.function.arguments).decode()
    function = {"description": call.function.description, "name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}
