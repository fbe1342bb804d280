"""vLLM's ways to ask for structured output (`guided_json`, `structured_outputs`...) become a `response_format`."""

from __future__ import annotations

import re
from typing import Any

from server.requests.serde import unexpected, wrong

STRUCTURED_OUTPUTS = "structured_outputs"
PREFIX = "guided_"
_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
GUIDED_KEYS = frozenset({STRUCTURED_OUTPUTS, *(f"{PREFIX}{kind}" for kind in ("json", "regex", "choice", "grammar"))})


def read_guided(body: dict[str, Any]) -> dict[str, Any]:
    """The body with a `response_format` in place of vLLM's keys; null is none of them. Raises what `wrong` makes."""
    values = {key: body[key] for key in GUIDED_KEYS & body.keys() if body[key] is not None}
    if not values:
        return body
    constraints = _constraints(values)
    is_formatted = body.get("response_format") not in (None, {"type": "text"})
    if len(constraints) > 1 or (constraints and is_formatted):
        raise wrong(f"{' and '.join(sorted(values))}: only one constraint on the output can be held to")
    rest = {key: value for key, value in body.items() if key not in GUIDED_KEYS}
    if constraints:
        rest["response_format"] = _format(*constraints[0])
    return rest


def _constraints(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Kind and value of each constraint. Clients for old and new servers say the same in both spellings."""
    constraints = [(key.removeprefix(PREFIX), value) for key, value in values.items() if key != STRUCTURED_OUTPUTS]
    nested = values.get(STRUCTURED_OUTPUTS, {})
    if not isinstance(nested, dict):
        raise wrong(f"{STRUCTURED_OUTPUTS}: invalid type: {unexpected(nested)}, expected a map")
    further = [(kind, nested[kind]) for kind in _KINDS if nested.get(kind) not in (None, False)]
    return constraints + [constraint for constraint in further if constraint not in constraints]


def _format(kind: str, value: Any) -> dict[str, Any]:
    match kind:
        case "json":
            return {"type": "json", "value": value}
        case "json_object":
            return {"type": "json_object"}
        case "regex":
            return {"type": "regex", "value": value}
        case "choice":
            return {"type": "regex", "value": _alternatives(value)}
    raise wrong(f"`{kind}` is not supported: give a JSON schema, a regular expression or a choice")


def _alternatives(value: Any) -> str:
    """A regular expression for one of several texts."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise wrong("`choice`: invalid value, expected a list of texts that are not empty")
    return "|".join(map(re.escape, value))
