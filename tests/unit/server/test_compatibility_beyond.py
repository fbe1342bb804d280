"""What docs/compatibility.md has beyond its rows, about templates, messages and schemas, in both modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.chat.template import ChatTemplate
from server.errors import TemplateError
from tests.unit.server.harness import chat_format_of

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "compatibility.md"
USER: dict[str, Any] = {"role": "user", "content": "hey"}
CHAT = "/v1/chat/completions"
UNKNOWN_TAG = "syntax error: Encountered unknown tag 'generation'. (in <string>:1)"
TEMPLATES = {
    "{% generation %}a{% endgeneration %}": ("a", "a"),
    "{%- generation -%} a{%- endgeneration %}": ("a", UNKNOWN_TAG),
    "{%generation%}a{%endgeneration%}": ("a", UNKNOWN_TAG),
    "  {% if true %}\na\n  {% endif %}\nb": ("a\nb", "  \na\n  \nb"),
    "{{ true }} {{ false }} {{ none }}": ("True False None", "true false none"),
    "{{ bos_token }}|{{ bos_token is defined }}": ("|False", "none|true"),
    "{{ raise_exception('no') }}": ("no", "syntax error: no (in <string>:1)"),
}
"""What a template makes of one message, or why not: by default, with --strict-tgi."""


def call(**changes: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}} | changes


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in call().items() if name != key}


def called(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": list(calls)}, {"role": "tool", "content": "x"}]}


def function(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | changes}


BODIES: list[tuple[dict[str, Any], bool, bool]] = [
    (called(call()), True, True),
    (called(without("id")), True, False),
    (called(without("type")), True, False),
    ({"messages": [USER], "tools": [function(parameters={})], "tool_choice": "none"}, True, True),
    ({"messages": [USER], "tools": [function()], "tool_choice": "none"}, True, False),
    ({"messages": [USER], "tool_choice": "required"}, False, True),
    ({"messages": [USER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, False, True),
    ({"messages": []}, False, True),
]
"""Chats, and whether they are answered: by default, with --strict-tgi."""

TEXT = {"type": "string"}
SCHEMAS: list[tuple[Any, str | None, bool]] = [
    ({"properties": {"a": TEXT}}, None, True),
    ({"type": "object", "properties": {"a": TEXT}, "required": ["b"]}, None, False),
    ({"properties": {"a": {"type": "str"}}}, None, False),
    ({"properties": {"a": TEXT}, "required": None}, None, False),
    ({"properties": {"a": TEXT | {"pattern": "^(?!x)y$"}}}, "#/properties/a/pattern", False),
    ({"properties": {"a": TEXT | {"pattern": "("}}}, "#/properties/a/pattern", False),
    ({"properties": {"a": TEXT | {"format": "path"}}}, "#/properties/a/format", True),
    ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "#/properties/a/uniqueItems", True),
    ({"properties": {"a": {"not": TEXT}}}, "#/properties/a/not", True),
    ({"properties": {"a": TEXT}, "if": {"required": ["a"]}}, "#/if", True),
    ({"type": "array"}, None, False),
]
"""Schemas, what is left open of them by default, and whether --strict-tgi takes them."""


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("source", TEMPLATES)
def test_templates(source: str, is_strict: bool) -> None:
    template = ChatTemplate(chat_format_of(source), is_strict=is_strict)
    try:
        rendered = template.render([])
    except TemplateError as error:
        rendered = str(error)
    assert rendered == TEMPLATES[source][is_strict]


@pytest.mark.parametrize("body, by_default, strictly", BODIES)
async def test_bodies(
    client: httpx.AsyncClient,
    strict_client: httpx.AsyncClient,
    body: dict[str, Any],
    by_default: bool,
    strictly: bool,
) -> None:
    assert (await client.post(CHAT, json=body)).status_code == (200 if by_default else 400)
    assert (await strict_client.post(CHAT, json=body)).status_code == (200 if strictly else 422)


@pytest.mark.parametrize("schema, left_open, is_taken_strictly", SCHEMAS)
async def test_schemas(
    client: httpx.AsyncClient,
    strict_client: httpx.AsyncClient,
    schema: Any,
    left_open: str | None,
    is_taken_strictly: bool,
) -> None:
    body = {"messages": [USER], "response_format": {"type": "json_object", "value": schema}}
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200 and answer.headers.get("x-schema-left-open") == left_open
    answer = await strict_client.post(CHAT, json=body)
    assert answer.status_code == (200 if is_taken_strictly else 422)
    assert "x-schema-left-open" not in answer.headers


def test_every_row_has_both_modes() -> None:
    _, beyond = DOCUMENT.read_text().split("## Beyond the rows")
    rows = [line for line in beyond.splitlines() if line.startswith("|")]
    assert len(rows) > 60
    subjects = [row.split(" | ")[0] for row in rows[2:]]
    assert len(set(subjects)) == len(subjects)
    assert all(row.count(" | ") == 2 for row in rows[2:])
