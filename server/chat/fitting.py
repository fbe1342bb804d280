"""A chat's messages in the forms that a template may take. Plain dicts, as transformers passes them on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from server.chat.marks import CLOSE, OPEN
from server.chat.template_engines import transformers_json
from server.chat.template_traits import TemplateTraits

Message = dict[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's thoughts. Templates read the first; the second is gpt-oss's."""


def forms_of(messages: Sequence[Message], traits: TemplateTraits) -> Iterator[list[Message]]:
    """The messages in each form that makes a difference, the likeliest to be taken first.

    Most templates need the arguments of a call as an object, some, as DeepSeek's, as JSON text. A content that is null
    stays null, as with transformers; some templates can only take a text.
    """
    fitted = [_fitted(message, traits) for message in messages]
    has_calls = any("tool_calls" in message for message in fitted)
    has_nulls = any(message["content"] is None for message in fitted)
    ways = itertools.product((False, True) if has_nulls else (False,), (False, True) if has_calls else (False,))
    for is_empty, has_json_text in ways:
        form = [_with_calls(message, has_json_text) for message in fitted]
        yield without_nulls(form) if is_empty else form


def without_nulls(messages: Sequence[Message]) -> list[Message]:
    """The messages with an empty text for each content that is null."""
    return [message | {"content": ""} if message["content"] is None else message for message in messages]


def _with_calls(message: Message, has_json_text: bool) -> Message:
    if "tool_calls" not in message:
        return message
    return message | {"tool_calls": [_with_arguments(call, has_json_text) for call in message["tool_calls"]]}


def _with_arguments(call: dict[str, Any], has_json_text: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = _as_json(function["arguments"]) if has_json_text else _object_of(function["arguments"])
    return call | {"function": function | {"arguments": arguments}}


def _object_of(arguments: str) -> dict[str, Any]:
    """The arguments of a call. What is no object, for a model wrote it, or nobody did, is an empty one."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _as_json(arguments: str) -> str:
    return arguments if _object_of(arguments) else "{}"


def _fitted(message: Message, traits: TemplateTraits) -> Message:
    """A message that has nothing of which the template knows nothing."""
    if message["role"] == "developer" and not traits.has_developer:
        message = message | {"role": "system"}
    if "tool_calls" in message and not traits.has_calls:
        message = _with_calls_as_text(message)
    return _with_reasoning(message | {"content": _fitted_content(message["content"], traits)})


def _fitted_content(content: Any, traits: TemplateTraits) -> Any:
    if isinstance(content, list) and not traits.has_parts:
        return text_of(content)
    if isinstance(content, str) and not traits.has_texts:
        return [{"type": "text", "text": content}]
    return content


def text_of(content: str | list[dict[str, str]] | None) -> str:
    """The text of a content."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _with_calls_as_text(message: Message) -> Message:
    """A message with its calls as the text that the model would have written."""
    calls = [
        f'{{"name": {transformers_json(function["name"])}, "arguments": {_as_json(function["arguments"])}}}'
        for function in (call["function"] for call in message["tool_calls"])
    ]
    written = [f"{OPEN}\n{call}\n{CLOSE}" for call in calls]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return kept | {"content": "\n".join(filter(None, [text_of(message["content"]), *written]))}


def _with_reasoning(message: Message) -> Message:
    """A message whose thoughts have each name that a template may look for, as transformers gives them."""
    thoughts = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts} | message | {"reasoning_content": thoughts}


def with_end(message: Message, text: str, *, is_stripped: bool = False) -> Message | None:
    """The message with `text` behind its content; None: it has none. `is_stripped`: white space between them goes."""
    content = message.get("content")
    if content is None:
        return None
    if isinstance(content, str):
        return message | {"content": (content.rstrip() if is_stripped else content) + text}
    *parts, last = content or [{"type": "text", "text": ""}]
    words = last["text"].rstrip() if is_stripped else last["text"]
    return message | {"content": [*parts, last | {"text": words + text}]}
