"""Functions that a chat offers. OpenAI's older `functions` and `function_call` become `tools` and a `tool_choice`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import TypeAdapter

from server.requests.messages import CalledFunction
from server.requests.serde import ListOf, reading, wrong_at

NEWER_KEYS = {"functions": "tools", "function_call": "tool_choice"}


class OfferedFunction(CalledFunction):
    """Its `arguments` are a JSON schema. If that is left out, as OpenAI allows, the function takes none."""

    strict: bool = False
    """A schema that the model cannot be held to in full is refused where a call is required."""

    extensions: ClassVar[frozenset[str]] = frozenset({"strict"})


_FUNCTIONS: TypeAdapter[list[OfferedFunction]] = TypeAdapter(ListOf[OfferedFunction])


def read_functions(body: dict[str, Any]) -> dict[str, Any]:
    """The body with newer keys in place of the older ones; null is none of them. Raises what `wrong_at` makes."""
    older = {key: body[key] for key in NEWER_KEYS if body.get(key) is not None}
    if not older:
        return body
    rest = {key: value for key, value in body.items() if key not in NEWER_KEYS}
    for key, value in older.items():
        newer = NEWER_KEYS[key]
        if rest.get(newer) is not None:
            raise wrong_at(key, f"there is `{newer}` as well, which has taken its place")
        rest[newer] = _tools(value) if newer == "tools" else _choice(value)
    return rest


def _tools(functions: Any) -> list[dict[str, Any]]:
    with reading("functions"):
        _FUNCTIONS.validate_python(functions, strict=True)
    return [{"type": "function", "function": function} for function in functions]


def _choice(choice: Any) -> str | dict[str, Any]:
    if isinstance(choice, dict) and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    if isinstance(choice, str) and choice in ("auto", "none"):
        return choice
    raise wrong_at("function_call", 'invalid value, expected "auto", "none" or {"name": NAME}')
