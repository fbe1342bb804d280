"""Objects with no other keys than the declared ones."""

from __future__ import annotations

import json
from typing import Any

from server.schemas.parts import walk

_INTERSECTING = ("allOf", "anyOf", "oneOf", "$ref")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with no other keys than the declared ones, wherever it says nothing of others, as in TGI.

    A model would otherwise be free to add any. Where objects are intersected, all would refuse each other's keys, so
    such a schema stays as it is. Raises RecursionError.
    """
    if not any(_is_intersecting(part) for part in walk(schema)):
        schema = json.loads(json.dumps(schema))
        for part in walk(schema):
            if "properties" in part:
                part.setdefault("additionalProperties", False)
    return schema


def _is_intersecting(part: dict[str, Any]) -> bool:
    members = part.get("allOf")
    is_refined = "properties" in part and any(key in part for key in _INTERSECTING)
    return is_refined or (isinstance(members, list) and len(members) > 1)
