"""Chat templates as minijinja renders them, and messages as bodies may have them."""

from __future__ import annotations

import copy
from typing import Any

import pydantic
import pytest

from server.chat.rendering import Ending
from server.chat.template import ChatTemplate
from server.errors import TemplateError, ValidationError
from server.requests.openai import ChatRequest
from tests.unit.server.harness import CHATML, chat_format_of

USER = [{"role": "user", "content": "hey"}]


def render(
    template: str | None,
    messages: list[dict[str, Any]],
    *,
    is_strict: bool = True,
    ending: Ending = Ending.AUTOMATIC,
) -> str:
    request = ChatRequest.model_validate({"messages": copy.deepcopy(messages)}, context={"is_strict": is_strict})
    chat_template = ChatTemplate(chat_format_of(template, eos_token="</s>"), is_strict=is_strict)
    return chat_template.render(request.messages, ending=ending)


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


def here(template: str, messages: list[dict[str, Any]], ending: Ending = Ending.AUTOMATIC) -> str:
    return render(template, messages, is_strict=False, ending=ending)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{{ bos_token }}{{ bos_token is defined }}{{ eos_token }}", "False</s>"),
        ("{{ true }}|{{ none }}|{{ add_generation_prompt }}", "True|None|True"),
        ("{%- generation -%} {{ messages[0].content }} {%- endgeneration %}", "hey"),
    ],
)
def test_templates_are_rendered_as_transformers_does(template: str, rendered: str) -> None:
    assert here(template, USER) == rendered


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a\n{{ raise_exception('only user roles') }}", "only user roles"),
        ("{% if %}", "syntax error: Expected an expression, got 'end of statement block' (in <string>:1)"),
        ("\n\n{{ missing.field }}", "undefined value: 'missing' is undefined (in <string>:3)"),
    ],
)
def test_template_errors_here(template: str, text: str) -> None:
    with pytest.raises(TemplateError) as raised:
        here(template, USER)
    assert str(raised.value) == text


CONTENTS: list[tuple[dict[str, Any], str]] = [
    ({"content": None}, ""),
    ({"content": []}, ""),
    ({"content": ["a", {"type": "text", "text": "b"}]}, "ab"),
    ({"content": None, "refusal": "no"}, "no"),
    ({"content": [{"type": "refusal", "refusal": "I can't"}]}, "I can't"),
    ({"content": [{"type": "output_text", "text": "a", "annotations": []}, {"type": "thinking", "x": 1}, {}]}, "a"),
    ({"content": [{"type": ["text"], "text": "a"}, {"type": {}, "arguments": None}]}, "a"),
    ({"content": "said", "refusal": None, "tool_calls": None, "audio": None}, "said"),
]


@pytest.mark.parametrize(("body", "content"), CONTENTS)
def test_contents_that_tgi_does_not_know(body: dict[str, Any], content: str) -> None:
    assert here("<{{ messages[0].content }}>", [{"role": "user"} | body]) == f"<{content}>"
    assert here("{{ '<' + messages[0].content + '>' }}", [{"role": "user"} | body]) == f"<{content}>"


def test_a_comment_on_calls_shows_none() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    prompt = here("{# tool_calls #}" + CHATML, [{"role": "assistant", "tool_calls": [call]}, *USER])
    assert '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' in prompt


def test_an_assistant_may_say_nothing_at_all() -> None:
    assert here(CHATML, [*USER, {"role": "assistant"}, *USER]).count("<|im_end|>") == 3


@pytest.mark.parametrize(
    "content", [{"type": "text", "text": "a"}, 5, [5], [{"type": "text"}], [{"type": "text", "text": 1}]]
)
@pytest.mark.parametrize("is_strict", [False, True])
def test_contents_of_no_shape(content: Any, is_strict: bool) -> None:
    text = "data did not match any variant of untagged enum MessageBody" if is_strict else "invalid type|missing field"
    with pytest.raises(pydantic.ValidationError, match=text):
        render(CHATML, [{"role": "user", "content": content}], is_strict=is_strict)


@pytest.mark.parametrize("body", [{}, {"content": None}, *(body for body, _ in CONTENTS[2:6])])
def test_strictly_they_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        render(CHATML, [{"role": "assistant"} | body])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": "http://x/y.png"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
    ],
)
def test_a_text_model_is_shown_no_pictures(part: dict[str, Any]) -> None:
    messages = [*USER, {"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
    with pytest.raises(ValidationError) as raised:
        here(CHATML, messages)
    kind = part["type"]
    assert str(raised.value) == f"messages[1]: this model reads text only, it cannot take a part of type `{kind}`"


@pytest.mark.parametrize("end", [Ending.AUTOMATIC, Ending.CONTINUED, Ending.NEW, Ending.CLOSED])
@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": None, "tool_calls": []}, {"refusal": None}])
@pytest.mark.parametrize("template", [CHATML, "{% for m in messages %}<{{ m.role }}:{{ m.content }}>{% endfor %}"])
def test_an_assistant_that_said_nothing_yet_goes_on(template: str, said: dict[str, Any], end: Ending) -> None:
    silent = here(template, [*USER, {"role": "assistant"} | said], end)
    assert silent == here(template, [*USER, {"role": "assistant", "content": ""}], end)


NAMES_DEVELOPER = CHATML + "{% if messages[0].role == 'developer' %}!{% endif %}"


COMMENTS_ON_DEVELOPER = "{#- 'system', 'developer' -#}" + CHATML + '{% raw %}{{ "developer" }}{% endraw %}'


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (CHATML, "system"),
        (COMMENTS_ON_DEVELOPER, "system"),
        (NAMES_DEVELOPER, "developer"),
        (CHATML + """{% set x = messages[0].role in ["system", "developer"] %}""", "developer"),
    ],
)
def test_a_developer_takes_the_systems_place(template: str, role: str) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *USER]
    assert here(template, messages).startswith(f"<|im_start|>{role}\nBe brief.<|im_end|>")
    assert render(template, messages).startswith("<|im_start|>developer\n")


SHOWS_ARGUMENTS = (
    "{% for c in messages[0].tool_calls %}{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}."
    "{% endfor %}"
)


@pytest.mark.parametrize("arguments", ["", "  ", "null", "[1]", "5", '"text"', "{", "{'a': 1}", None, [], {}])
def test_arguments_that_are_no_object_are_none(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert here(SHOWS_ARGUMENTS, [message]) == "."
    assert '{"name": "f", "arguments": {}}' in here(CHATML, [message])
    del call["id"], call["type"], call["function"]["arguments"]  # type: ignore[attr-defined]
    assert here(SHOWS_ARGUMENTS, [message]) == "."
    with pytest.raises(pydantic.ValidationError):
        render(SHOWS_ARGUMENTS, [message])


def test_a_last_message_with_calls_is_not_continued() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*USER, {"role": "assistant", "content": "I look.", "tool_calls": [call]}]
    assert here(CHATML, messages).endswith("</tool_call><|im_end|>\n<|im_start|>assistant\n")
