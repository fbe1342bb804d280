"""Chat templates as minijinja renders them."""

from __future__ import annotations

from typing import Any

import pytest

from server.chat.template import ChatTemplate
from server.errors import TemplateError
from server.requests.openai import ChatRequest
from server.text.tokenizer import ChatFormat
from tests.unit.server.harness import CHATML

USER = [{"role": "user", "content": "hey"}]


def render(template: str | None, messages: list[dict[str, Any]], *, is_strict: bool = True) -> str:
    request = ChatRequest.model_validate({"messages": messages}, context={"is_strict": is_strict})
    chat_format = ChatFormat(template=template, bos_token=None, eos_token="</s>")
    return ChatTemplate(chat_format, is_strict=is_strict).render(request.messages)


def test_chatml() -> None:
    assert render(CHATML, USER) == "<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("  {% if true %}\nx\n  {% endif %}\n", "  \nx\n  "),  # blocks are not trimmed
        ("{{ eos_token }}{{ bos_token }}{{ true }}{{ missing }}", "</s>nonetrue"),
        ("{{ {'b': [1, 2], 'a': \"<'&>é\"} | tojson }}", '{"a":"\\u003c\\u0027\\u0026\\u003eé","b":[1,2]}'),
        ("{{ {'b': 1} | tojson(indent=2) }}", '{\n  "b": 1\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% for m in messages[::-1] %}{{ m.content }}{% endfor %}", "hey"),
        ("{% generation %}{{ messages[0].content.upper() }}{% endgeneration %}", "HEY"),
        ("{{ tools is none }}{{ add_generation_prompt }}", "truetrue"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_engine_differences(template: str, rendered: str) -> None:
    assert render(template, USER) == rendered


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "template not found"),
        ("a\n{{ raise_exception('only user roles') }}", "syntax error: only user roles (in <string>:2)"),
        ("{% if %}", "syntax error: Expected an expression, got 'end of statement block' (in <string>:1)"),
        ("\n\n{{ missing.field }}", "undefined value: 'missing' is undefined (in <string>:3)"),
        ("{{ 1 + 'a' }}", "invalid operation: unsupported operand type(s) for +: 'int' and 'str' (in <string>:1)"),
    ],
)
def test_template_errors(template: str | None, text: str) -> None:
    with pytest.raises(TemplateError) as raised:
        render(template, USER)
    assert str(raised.value) == text


def test_template_is_sandboxed() -> None:
    with pytest.raises(TemplateError, match="unsafe"):
        render("{{ ''.__class__.__mro__ }}", USER)


def test_last_message_of_the_assistant_is_continued() -> None:
    messages = [*USER, {"role": "assistant", "content": "Sure, \n"}]
    assert render(CHATML, messages) == "<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\nSure,"


def test_continuation_that_the_template_hides_changes_nothing() -> None:
    assert render("x  ", [{"role": "assistant", "content": "y"}]) == "x  "


@pytest.mark.parametrize(
    ("body", "content"),
    [
        ({"content": "plain"}, "plain"),
        ({"content": []}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}, "![](http://x/y.png)"),
        ({"content": "wins", "tool_calls": [], "name": "n", "tool_call_id": "1"}, "wins"),
        (
            {
                "content": None,
                "tool_calls": [
                    {"id": "0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                    {"id": "1", "type": "function", "function": {"name": "g", "parameters": {"z": "é", "b": 2}}},
                ],
            },
            '[{"id":"0","type":"function","function":'
            r'{"description":null,"name":"f","arguments":"\"{\\\"a\\\": 1}\""}},'
            '{"id":"1","type":"function","function":'
            r'{"description":null,"name":"g","arguments":"{\"z\":\"é\",\"b\":2}"}}]',
        ),
    ],
)
def test_content_becomes_one_string(body: dict[str, Any], content: str) -> None:
    assert render("{{ messages[0].content }}", [{"role": "user"} | body]) == content
