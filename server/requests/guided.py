"""vLLM's ways to ask for structured output (`guided_json`, `structured_outputs`...) become a `response_format`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from server.errors import INVALID_VALUE
from server.requests.serde import INVALID_TYPE, WrongShape, unexpected, wrong_at, wrong_within

STRUCTURED_OUTPUTS = "structured_outputs"
PREFIX = "guided_"
_HELD_KINDS = ("json", "json_object", "regex", "choice", "grammar")
_KINDS = (*_HELD_KINDS, "structural_tag")
GUIDED_KEYS = frozenset({STRUCTURED_OUTPUTS, *(f"{PREFIX}{kind}" for kind in ("json", "regex", "choice", "grammar"))})


@dataclass(frozen=True, slots=True)
class _Constraint:
    kind: str
    value: Any
    key: str = field(compare=False)
    """The place in the body. Clients for old and new servers say the same in both spellings."""


def read_guided(body: dict[str, Any]) -> dict[str, Any]:
    """The body with a `response_format` in place of vLLM's keys, and in `format_key` the key that stood for it.

    Null is none of the keys. Raises what `wrong_at` makes.
    """
    values = {key: body[key] for key in GUIDED_KEYS & body.keys() if body[key] is not None}
    if not values:
        return body
    constraints = _constraints(values)
    is_formatted = body.get("response_format") not in (None, {"type": "text"})
    if len(constraints) > 1 or (constraints and is_formatted):
        names = sorted(values)
        reason = f"{' and '.join(names)}: only one constraint on the output can be held to"
        raise wrong_within("", WrongShape(reason, "", names[0], INVALID_VALUE))
    rest = {key: value for key, value in body.items() if key not in GUIDED_KEYS}
    if constraints:
        rest |= {"response_format": _format(constraints[0]), "format_key": constraints[0].key}
    return rest


def _constraints(values: dict[str, Any]) -> list[_Constraint]:
    constraints = [
        _Constraint(key.removeprefix(PREFIX), value, key)
        for key, value in sorted(values.items())
        if key != STRUCTURED_OUTPUTS
    ]
    nested = values.get(STRUCTURED_OUTPUTS)
    if nested is None:
        return constraints
    if not isinstance(nested, dict):
        reason = f"invalid type: {unexpected(nested)}, expected a map"
        raise wrong_at(STRUCTURED_OUTPUTS, reason, INVALID_TYPE)
    if nested.keys().isdisjoint(_KINDS):
        reason = "there is no constraint, expected one of " + ", ".join(f"`{kind}`" for kind in _HELD_KINDS)
        raise wrong_at(STRUCTURED_OUTPUTS, reason)
    for kind in _KINDS:
        constraint = _Constraint(kind, nested.get(kind), f"{STRUCTURED_OUTPUTS}.{kind}")
        if constraint.value not in (None, False) and constraint not in constraints:
            constraints.append(constraint)
    return constraints


def _format(constraint: _Constraint) -> dict[str, Any]:
    match constraint.kind:
        case "json":
            return {"type": "json", "value": constraint.value}
        case "json_object":
            return {"type": "json_object"}
        case "regex":
            return {"type": "regex", "value": constraint.value}
        case "choice":
            return {"type": "regex", "value": _alternatives(constraint)}
        case "grammar":
            if not isinstance(constraint.value, str):
                raise wrong_at(constraint.key, f"invalid type: {unexpected(constraint.value)}, expected a string")
            return {"type": "grammar", "grammar": constraint.value}
    raise wrong_at(
        constraint.key,
        f"`{constraint.kind}` is not supported: give a JSON schema, a regular expression, a choice or a grammar",
    )


def _alternatives(constraint: _Constraint) -> str:
    """A regular expression for one of several texts."""
    value = constraint.value
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise wrong_at(constraint.key, "invalid value, expected a list of texts that are not empty")
    return "|".join(map(re.escape, value))
