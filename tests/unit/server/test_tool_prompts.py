"""What the model reads of tools and calls: as transformers renders them, and under --strict-tgi as TGI does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from server.chat.rendering import Ending
from server.chat.template import ChatTemplate
from server.chat.tools import TGI_PROMPT, ending, use_tools
from server.errors import TemplateError, ToolError, ValidationError
from server.requests.openai import ChatRequest
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import CHATML, chat_format_of

QWEN2_5 = Path(__file__).with_name("qwen2_5.jinja").read_text()
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Today\'s weather <now> & "here"',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["°C", "°F"]}},
            "required": ["city"],
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "Weather in Paris & Rome?"}


def call(id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [call("a", "get_weather", '{"city": "Paris", "n": [1, 2.0]}'), call("b", "clock", "{}")],
}
LOOP = [
    {"role": "system", "content": "Be brief."},
    USER,
    CALLS,
    {"role": "tool", "tool_call_id": "a", "content": "18 °C"},
    {"role": "tool", "tool_call_id": "b", "name": "clock", "content": [{"type": "text", "text": "12:00"}]},
    CALLS | {"content": "And now Rome."},
    {"role": "tool", "tool_call_id": "a", "content": "20 °C"},
]


def read(body: dict[str, Any], *, is_strict: bool = False) -> ChatRequest:
    return ChatRequest.model_validate(json.loads(json.dumps(body)), context={"is_strict": is_strict})


def prompt_of(template: str, body: dict[str, Any], tokenizer: TextTokenizer, *, is_strict: bool = False) -> str:
    request = read({"messages": [USER]} | body, is_strict=is_strict)
    use = use_tools(request, tokenizer, is_strict=is_strict)
    chat_format = chat_format_of(template, eos_token="<|im_end|>")
    return ChatTemplate(chat_format, is_strict=is_strict).render(request.messages, use.offered, ending(request))


def as_transformers(messages: list[dict[str, Any]], template: str = QWEN2_5, **options: Any) -> str:
    """What apply_chat_template gives; it takes arguments as objects and content as text."""
    shown = []
    for message in messages:
        message = dict(message)
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
        if "tool_calls" in message:
            message["tool_calls"] = [
                call(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"]))
                for c in message["tool_calls"]
            ]
        shown.append(message)
    rendered, _ = render_jinja_template([shown], chat_template=template, **options)
    prompt: str = rendered[0]
    return prompt


@pytest.mark.parametrize("messages", [[USER], LOOP, LOOP[:3], [USER, {"role": "assistant", "content": "18"}, USER]])
@pytest.mark.parametrize("tools", [None, [WEATHER, CLOCK]])
def test_prompts_equal_those_of_transformers(
    tokenizer: TextTokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    ours = prompt_of(QWEN2_5, {"messages": messages, "tools": tools}, tokenizer)
    assert ours == as_transformers(messages, tools=tools, add_generation_prompt=True)


@pytest.mark.parametrize("content", ["Sure, ", "  Well:\n", "18"])
def test_a_continued_message_is_that_of_transformers(tokenizer: TextTokenizer, content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    ours = prompt_of(QWEN2_5, {"messages": messages, "continue_final_message": True}, tokenizer)
    assert ours == as_transformers(messages, continue_final_message=True)
    assert ours.endswith(content)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, Ending.AUTOMATIC),
        ({"continue_final_message": None, "add_generation_prompt": None}, Ending.AUTOMATIC),
        ({"continue_final_message": False}, Ending.NEW),
        ({"add_generation_prompt": True}, Ending.NEW),
        ({"add_generation_prompt": False}, Ending.CLOSED),
        ({"continue_final_message": True}, Ending.CONTINUED),
        ({"continue_final_message": True, "add_generation_prompt": False}, Ending.CONTINUED),
    ],
)
def test_endings(options: dict[str, Any], wanted: Ending) -> None:
    assert ending(read({"messages": [USER]} | options)) is wanted
    assert ending(read({"messages": [USER]} | options, is_strict=True)) is Ending.AUTOMATIC


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, "<|im_start|>assistant\nSure,"),
        ({"add_generation_prompt": True}, "<|im_start|>assistant\nSure, <|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "<|im_start|>assistant\nSure, <|im_end|>\n"),
    ],
)
def test_how_a_last_message_of_the_assistant_ends(tokenizer: TextTokenizer, options: dict[str, Any], end: str) -> None:
    messages = [USER, {"role": "assistant", "content": "Sure, "}]
    prompt = prompt_of(CHATML, {"messages": messages} | options, tokenizer)
    assert prompt == f"<|im_start|>user\n{USER['content']}<|im_end|>\n{end}"


def test_endings_that_contradict(tokenizer: TextTokenizer) -> None:
    both = {"continue_final_message": True, "add_generation_prompt": True}
    with pytest.raises(ValidationError, match="`continue_final_message` and `add_generation_prompt` must not both"):
        prompt_of(CHATML, both, tokenizer)
    with pytest.raises(TemplateError, match="the last message has no text to go on with"):
        prompt_of(QWEN2_5, {"messages": [USER, CALLS], "continue_final_message": True}, tokenizer)


def test_a_template_that_wants_arguments_as_text(tokenizer: TextTokenizer) -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }};"
        "{% endfor %}{% endfor %}"
    )
    assert prompt_of(template, {"messages": LOOP[:3]}, tokenizer) == (
        'get_weather{"city": "Paris", "n": [1, 2.0]};clock{};'
    )


def test_a_template_that_knows_no_tools(tokenizer: TextTokenizer) -> None:
    prompt = prompt_of(CHATML, {"messages": [USER, CALLS, LOOP[3]], "tools": [CLOCK]}, tokenizer)
    assert prompt == (
        f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "n": [1, 2.0]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n18 °C\n---\n"
        '{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}\n'
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("template", [CHATML, QWEN2_5])
def test_a_prompt_of_the_clients_own(tokenizer: TextTokenizer, template: str, is_strict: bool) -> None:
    prompt = prompt_of(template, {"tools": [CLOCK], "tool_prompt": "Call!"}, tokenizer, is_strict=is_strict)
    assert prompt.endswith("Call!<|im_end|>\n<|im_start|>assistant\n")
    assert "within <tool_call>" not in prompt if template is CHATML else f"{USER['content']}\n---\nCall!" in prompt


SHOWN_BY_TGI = (
    '{"function":{"arguments":"{\\"type\\":\\"object\\",\\"properties\\":{}}","description":null,"name":"clock"},'
    '"type":"function"}'
)
NO_TOOL_SHOWN = (
    '{"function":{"arguments":"{\\"type\\":\\"object\\"}",'
    '"description":"Open ended response with no specific tool selected","name":"no_tool"},"type":"function"}'
)


@pytest.mark.parametrize(("choice", "shown"), [("auto", [SHOWN_BY_TGI, NO_TOOL_SHOWN]), ("required", [SHOWN_BY_TGI])])
def test_tools_as_tgi_shows_them(tokenizer: TextTokenizer, choice: str, shown: list[str]) -> None:
    prompt = prompt_of(QWEN2_5, {"tools": [CLOCK], "tool_choice": choice}, tokenizer, is_strict=True)
    lines = "\n".join(shown)
    assert f"<tools>\n{lines}\n</tools>" in prompt
    assert f"Paris & Rome?\n---\n{TGI_PROMPT}<|im_end|>" in prompt


def test_tools_as_tgi_lists_them(tokenizer: TextTokenizer) -> None:
    prompt = prompt_of(CHATML, {"tools": [CLOCK], "tool_choice": "clock"}, tokenizer, is_strict=True)
    listed = (
        '[{"type":"function","function":{"description":null,"name":"clock",'
        '"arguments":"{\\"type\\":\\"object\\",\\"properties\\":{}}"}}]'
    )
    assert f"Rome?\n---\n{listed}\n{TGI_PROMPT}<|im_end|>" in prompt


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("body", [{"tools": []}, {"tools": [CLOCK], "tool_choice": "none"}])
def test_no_tools(tokenizer: TextTokenizer, body: dict[str, Any], is_strict: bool) -> None:
    assert prompt_of(QWEN2_5, body, tokenizer, is_strict=is_strict) == prompt_of(QWEN2_5, {}, tokenizer)


@pytest.mark.parametrize("choice", ["other", {"type": "function", "function": {"name": "other"}}])
def test_unknown_choice(tokenizer: TextTokenizer, choice: Any) -> None:
    with pytest.raises(ToolError, match="^Tool with name other not found$"):
        prompt_of(QWEN2_5, {"tools": [CLOCK], "tool_choice": choice}, tokenizer)


JSON_FORMAT = {"type": "json_object", "value": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("tools", [[], [CLOCK]])
def test_tools_and_a_response_format(tokenizer: TextTokenizer, tools: list[Any]) -> None:
    body = {"tools": tools, "response_format": JSON_FORMAT}
    with pytest.raises(ToolError, match="^Grammar and tools are mutually exclusive$"):
        prompt_of(QWEN2_5, body, tokenizer, is_strict=True)
    for choice in ("auto", "required", "none") if tools else ("auto", "none"):
        prompt = prompt_of(QWEN2_5, body | {"tool_choice": choice}, tokenizer)
        assert ("<tools>" in prompt) == (bool(tools) and choice != "none")
