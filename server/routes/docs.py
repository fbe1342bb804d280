"""The description of the API, for programs at /openapi.json and for people at /docs/, which needs no network."""

from __future__ import annotations

import html
from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from server.answers.json import json_answer
from server.operation import Area, Operation

area = Area()

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td {{ padding: 0.1em 1em 0.1em 0; vertical-align: top }}
h3 {{ margin-bottom: 0 }} code {{ font-size: 0.95em }}
</style>
<h1>{title} {version}</h1>
<p>{description} <a href="../openapi.json">openapi.json</a></p>
<h2>Routes</h2>
{routes}
<h2>Objects</h2>
{objects}
</html>
"""


@area.serve(Operation(method="GET", path="/docs", summary="Leads to /docs/", status=303, is_open=True))
async def docs(request: Request) -> Response:
    return RedirectResponse("/docs/", 303)


@area.serve(
    Operation(
        method="GET",
        path="/docs/",
        summary="This description, to be read",
        text="text/html; charset=utf-8",
        is_open=True,
    )
)
async def docs_page(request: Request) -> Response:
    return HTMLResponse(render(request.app.state.openapi))


def _document(path: str) -> Operation:
    return Operation(method="GET", path=path, summary="This description", answers=(dict[str, Any],), is_open=True)


@area.serve(_document("/openapi.json"), _document("/api-doc/openapi.json"))
async def openapi(request: Request) -> Response:
    return json_answer(request.app.state.openapi)


def render(document: dict[str, Any]) -> str:
    """`document` as a page of HTML."""
    operations = [
        _route(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    objects = [_object(name, schema) for name, schema in document["components"]["schemas"].items()]
    info = {key: html.escape(str(value)) for key, value in document["info"].items()}
    return _PAGE.format(routes="\n".join(operations), objects="\n".join(objects), **info)


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = []
    if "requestBody" in operation:
        rows.append(("takes", _content(operation["requestBody"])))
    for status, response in operation["responses"].items():
        rows.append((status, f"{html.escape(response['description'])}: {_content(response)}".rstrip(": ")))
    title = f"<code>{method.upper()} {html.escape(path)}</code>"
    return f"<h3>{title}</h3>\n{html.escape(operation['summary'])}\n{_table(rows)}"


def _content(holder: dict[str, Any]) -> str:
    return ", ".join(
        f"<code>{media.partition(';')[0]}</code> {_type(item['schema'])}"
        for media, item in holder.get("content", {}).items()
    )


def _object(name: str, schema: dict[str, Any]) -> str:
    fields = [
        (f"<code>{html.escape(field)}</code>", _type(of_field))
        for field, of_field in schema.get("properties", {}).items()
    ]
    words = html.escape(schema.get("description", ""))
    return f'<h3 id="{name}"><code>{name}</code></h3>\n{words}\n{_table(fields) if fields else _type(schema)}'


def _type(schema: dict[str, Any]) -> str:
    """A schema in words, with links to the objects in it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "enum" in schema:
        return " or ".join(f"<code>{html.escape(str(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "anything")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "\n".join(f"<tr><td>{left}<td>{right}" for left, right in rows)
    return f"<table>\n{cells}\n</table>"
