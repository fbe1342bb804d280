"""Prompts of chats equal those of `transformers`, byte for byte, in every style of template and kind of chat."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from server.app import create_app
from server.chat.rendering import Ending
from server.chat.template import ChatTemplate, OfferedTools
from server.errors import TemplateError
from server.requests.messages import Message
from server.text.tokenizer import TextTokenizer
from tests.contract.chat_templates import CHATML, STYLES, Style
from tests.unit.server.harness import (
    FakeEngine,
    chat_format_of,
    client_of,
    events_of,
    make_config,
    one_by_one,
    write_model_folder,
)

TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "image_token": "<|im_start|>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Today\'s weather <now> & "here"',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["°C", "°F"]}, "near": {"type": "object"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "Hello, how are you?"}
SYSTEM = {"role": "system", "content": " Be brief.\n"}
ANSWER = {"role": "assistant", "content": "Fine & dandy."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [call("abcdefghi", "get_weather", '{"city": "Paris", "n": [1, 2.0], "near": {"a": null}}')],
}
CALLED = [USER, CALL, {"role": "tool", "tool_call_id": "abcdefghi", "content": "18 °C"}]

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [USER],
    "with a system text": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ANSWER, USER, ANSWER | {"content": " \n"}, USER | {"content": ""}],
    "other scripts": [USER | {"content": "你好 👩‍👩‍👧 naïve <b>&amp;</b> 'x' \"y\" \\n {{ z }} {% if %}\r\n\ttab"}],
    "a call": CALLED,
    "calls": [
        SYSTEM,
        USER,
        CALL | {"content": "I look.", "tool_calls": [*CALL["tool_calls"], call("b", "clock", "{}")]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "18 °C"},
        {"role": "tool", "tool_call_id": "b", "name": "clock", "content": '{"now": "12:00"}'},
        ANSWER,
        USER,
    ],
    "arguments that are none": [USER, CALL | {"tool_calls": [call("abcdefghi", "clock", "")]}],
    "a developer": [{"role": "developer", "content": "Be precise."}, USER],
    "parts": [
        SYSTEM,
        USER | {"content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": ", you"}]},
        ANSWER,
        USER,
    ],
    "null": [USER, {"role": "assistant", "content": None}, USER],
    "thoughts in the text": [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFine."}, USER],
    "thoughts beside the text": [
        USER,
        ANSWER | {"reasoning_content": "Hm.\n"},
        USER,
        ANSWER | {"reasoning": "So"},
        USER,
    ],
    "thoughts and a call": [USER, CALL | {"reasoning_content": "I look."}, CALLED[2]],
    "a name and more": [USER | {"name": "Ann", "extra": {"b": [1, None], "a": True}}, ANSWER, USER | {"name": None}],
}
PREFILLS = ["Sure, ", "  Well:\n", "<", "a", "|", "end", "Hello, how are you?", "<think>\nHm", "é\n\n", "x" * 300]


@functools.cache
def compiled(style: Style) -> ChatTemplate:
    return ChatTemplate(chat_format_of(style.source, **tokens_of(style)))


def tokens_of(style: Style) -> dict[str, str]:
    return TOKENS | ({"bos_token": "<s>"} if style.has_bos else {})


def ours(style: Style, messages: list[dict[str, Any]], tools: list[Any] | None, ending: Ending) -> str:
    read = [Message.model_validate(copy.deepcopy(m), context={"is_strict": False}) for m in messages]
    return compiled(style).render(read, OfferedTools(tools=tools or ()), ending)


def for_template(message: dict[str, Any], style: Style) -> dict[str, Any]:
    """What a caller of transformers writes for a template that knows no more than `style` does."""
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = message["content"]
    if message["role"] == "developer" and not style.has_developer:
        message["role"] = "system"
    if isinstance(content, list) and not style.has_parts:
        message["content"] = "".join(part["text"] for part in content)
    if "tool_calls" in message and not style.has_calls:
        calls = [
            c["function"] | {"arguments": json.loads(c["function"]["arguments"] or "{}")} for c in message["tool_calls"]
        ]
        del message["tool_calls"]
        written = [f"<tool_call>\n{json.dumps(c, ensure_ascii=False)}\n</tool_call>" for c in calls]
        message["content"] = "\n".join([message["content"], *written] if message["content"] else written)
    if isinstance(message["content"], str) and style.has_only_parts:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return message


def with_arguments(message: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    calls = copy.deepcopy(message["tool_calls"])
    for called in calls:
        text = called["function"]["arguments"] or "{}"
        called["function"]["arguments"] = text if as_text else json.loads(text)
    return message | {"tool_calls": calls}


def forms(messages: list[dict[str, Any]], style: Style) -> Iterator[list[dict[str, Any]]]:
    """The forms in which a caller would try it, one after the other, until transformers renders one."""
    fitted = [for_template(message, style) for message in messages]
    for null in ({"content": None}, {"content": ""}):
        for as_text in (False, True):
            form = [with_arguments(m, as_text=as_text) if "tool_calls" in m else m for m in fitted]
            yield [{k: v for k, v in m.items() if k != "content"} | null if m["content"] is None else m for m in form]


def expected(style: Style, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """What transformers renders, or the template's own sentence; None: it renders no form."""
    for form in forms(messages, style):
        try:
            rendered, _ = render_jinja_template([form], chat_template=style.source, **options, **tokens_of(style))
        except jinja2.exceptions.UndefinedError:
            continue
        except jinja2.exceptions.TemplateError as error:
            return f"Error: {error}"
        except (TypeError, ValueError):
            continue
        prompt: str = rendered[0]
        if "None" in prompt and any(message["content"] is None for message in form):
            empty = [message | {"content": message["content"] or ""} for message in form]
            (plain,), _ = render_jinja_template([empty], chat_template=style.source, **options, **tokens_of(style))
            if plain.replace("None", "") == prompt.replace("None", ""):
                return str(plain)  # the template does nothing with null but to print it
        return prompt
    return None


def outcome(style: Style, messages: list[dict[str, Any]], tools: list[Any] | None, ending: Ending) -> str | None:
    try:
        return ours(style, messages, tools, ending)
    except TemplateError as error:
        is_own = not any(kind in str(error) for kind in ("undefined value: ", "invalid operation: ", "syntax error: "))
        return f"Error: {error}" if is_own else None


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_prompts_are_those_of_transformers(style: Style) -> None:
    num_rendered = 0
    for name, messages in CONVERSATIONS.items():
        for tools in [None, [WEATHER, CLOCK]] if style.has_tools else [None]:
            for ending in (Ending.NEW, Ending.CLOSED):
                has_prompt = ending is Ending.NEW
                right = expected(style, messages, tools=tools, add_generation_prompt=has_prompt)
                assert outcome(style, messages, tools, ending) == right, name
                num_rendered += right is not None and not right.startswith("Error: ")
    assert num_rendered >= len(CONVERSATIONS)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_continued_messages_are_those_of_transformers(style: Style) -> None:
    for text in PREFILLS:
        messages = [USER, {"role": "assistant", "content": text}]
        right = expected(style, messages, continue_final_message=True)
        if right is not None:
            assert outcome(style, messages, None, Ending.CONTINUED) == right, text


@pytest.mark.parametrize(
    ("variables", "written", "thought"),
    [
        ({}, "<think>\nHm.\n</think>\n\nFine.", "Hm."),
        ({"enable_thinking": True}, "<think>\nHm.\n</think>\n\nFine.", "Hm."),
        ({"enable_thinking": False}, "Fine.", None),
    ],
)
async def test_qwen3_thinks_as_chat_template_kwargs_say(
    variables: dict[str, bool], written: str, thought: str | None, tmp_path: Path
) -> None:
    """The prompt is that of `transformers`, and what the model writes after it is told apart, whole and streamed."""
    style, engine = STYLES["qwen3"], FakeEngine()
    write_model_folder(tmp_path, style.source)
    tokenizer = TextTokenizer.from_folder(str(tmp_path), 1)
    engine.script.events = one_by_one(await tokenizer.encode(f"{written}<|im_end|>", add_special_tokens=False))
    body = {"messages": [USER], **({"chat_template_kwargs": variables} if variables else {})}
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        answer = await client.post("/v1/chat/completions", json=body)
        streamed = await client.post("/v1/chat/completions", json={**body, "stream": True})
    thoughts = {} if thought is None else {"reasoning_content": thought}
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": "Fine.", **thoughts}
    deltas = [event["choices"][0]["delta"] for event in events_of(streamed.content)]
    for key, text in {"content": "Fine.", "reasoning_content": thought or ""}.items():
        assert "".join(delta.get(key) or "" for delta in deltas) == text
    prompt = expected(style, [USER], add_generation_prompt=True, **variables)
    assert [tokenizer.decode(request.prompt_token_ids) for request in engine.requests] == [prompt] * 2
    assert prompt is not None and prompt.endswith("<think>\n\n</think>\n\n") == (thought is None)


@pytest.mark.parametrize("text", ["<", "a", "end", "|", "s", "\n<", "assistant", "<|im_end|>", ""])
@pytest.mark.parametrize("ending", [Ending.AUTOMATIC, Ending.CONTINUED])
def test_a_prompt_ends_with_the_text_that_is_continued(text: str, ending: Ending) -> None:
    prompt = ours(Style(source=CHATML), [USER, {"role": "assistant", "content": text}], None, ending)
    assert prompt == f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n{text}"


FILES = "tokenizer_config.json chat_template.jinja additional_chat_templates/tool_use.jinja".split()
IN_CONFIG: list[Any] = [
    "{{ bos_token }}config",
    [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "{{ eos_token }}config tools"}],
    [{"name": "default", "template": "config"}, {"name": "rag", "template": "config rag"}],
    None,
]


@pytest.mark.parametrize("in_config", IN_CONFIG)
@pytest.mark.parametrize("files", [[], ["chat_template.jinja"], FILES[1:]], ids=["none", "one", "two"])
@pytest.mark.parametrize("tools", [None, [CLOCK]])
def test_the_template_is_the_one_that_transformers_reads(
    in_config: Any, files: list[str], tools: list[Any] | None, tmp_path: Path
) -> None:
    if in_config is None and not files:
        return
    write_model_folder(tmp_path, in_config)
    (tmp_path / "additional_chat_templates").mkdir()
    for name in files:
        (tmp_path / name).write_bytes(f"{name}\r\n{{{{ pad_token is defined }}}}{{{{ tools }}}}\n".encode())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    right = tokenizer.apply_chat_template([USER], tools=tools, tokenize=False)
    template = ChatTemplate(TextTokenizer.from_folder(str(tmp_path), 1).chat_format)
    message = Message.model_validate(dict(USER), context={"is_strict": False})
    assert template.render([message], OfferedTools(tools=tools or ())) == right
