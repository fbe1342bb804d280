"""jinja2 as transformers sets it up, and as TGI's template engine (minijinja) behaves. Neither knows of chats."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_HTML_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", ord("'"): "\\u0027"}
_PRINTED = {True: "true", False: "false", None: "none"}


class RaisedByTemplate(Exception):
    """`raise_exception(text)` was called."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which mark what is trained on.

    As in transformers the block is a call: what it sets is not set behind it.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    @staticmethod
    def _content(caller: Callable[[], str]) -> str:
        return caller()


def transformers_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    return _with_functions(environment, transformers_json)


def tgi_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=False, lstrip_blocks=False, extensions=[jinja2.ext.loopcontrols], finalize=_print_as_minijinja
    )
    return _with_functions(environment, _minijinja_json)


def _with_functions(
    environment: ImmutableSandboxedEnvironment, to_json: Callable[..., str]
) -> ImmutableSandboxedEnvironment:
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _print_as_minijinja(value: Any) -> Any:
    return _PRINTED[value] if value is None or isinstance(value, bool) else value


def transformers_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` of transformers: JSON as Python writes it, keys in their order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _minijinja_json(value: Any, indent: int | None = None) -> str:
    """minijinja's filter: keys sorted, no spaces unless indented, safe inside HTML."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, separators=separators, ensure_ascii=False, indent=indent)
    return text.translate(_HTML_ESCAPES)


def _raise_exception(text: str) -> NoReturn:
    raise RaisedByTemplate(text)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
