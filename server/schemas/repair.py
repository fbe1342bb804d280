"""The last resort: where llguidance refuses a schema nonetheless, as little of it as possible is left open.

The part without which the schema compiles is sought, from the outside in. Where it takes several, all parts are opened
and put back one by one. What cannot stay as it is loses a keyword, or all but its type, or is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from server.schemas.opening import HELD
from server.schemas.parts import Path, children, copied, pointer, put

_STRUCTURE = "type properties patternProperties items prefixItems anyOf oneOf allOf $defs definitions".split()
_KEYWORDS = {*HELD, "$ref", "const", "additionalProperties"}.difference(_STRUCTURE)


def repaired(part: Any, fits: Callable[[Any], bool], path: Path = ()) -> tuple[Any, list[str]]:
    """The part as far as it `fits`, and where it is left open.

    `fits`: whether the whole schema compiles with this in the place of the part.
    """
    if fits(part):
        return part, []
    if not isinstance(part, dict):
        return {}, [pointer(path)]
    for below, child in reversed(children(part)):
        if isinstance(child, dict) and (there := _fits_at(part, below, fits))(_stand_in(part, below)):
            part = copied(part)
            whole, left_open = repaired(child, there, path + below)
            put(part, below, whole)
            return part, left_open
    return _put_together(part, fits, path)


def _put_together(part: dict[str, Any], fits: Callable[[Any], bool], path: Path) -> tuple[dict[str, Any], list[str]]:
    bare = _with_open_children(part)
    left_open: list[str] = []
    if not fits(bare):
        key, bare = next(((key, attempt) for key, attempt in _attempts(bare) if fits(attempt)), ("", {}))
        left_open.append(pointer((*path, key) if key else path))
    for below, child in children(bare):
        original = _child(part, below)
        if child != original:
            whole, names = repaired(original, _fits_at(bare, below, fits), path + below)
            put(bare, below, whole)
            left_open += names
    return bare, left_open


def _with_open_children(part: dict[str, Any]) -> dict[str, Any]:
    part = copied(part)
    for below, child in children(part):
        if isinstance(child, dict):
            put(part, below, _stand_in(part, below))
    return part


def _stand_in(part: dict[str, Any], below: Path) -> dict[str, Any]:
    """What stands for a part that is taken out. An open alternative would hide what is wrong with the others."""
    is_alternative = below[0] in ("anyOf", "oneOf") and len(part[below[0]]) > 1
    return {"type": "null"} if is_alternative else {}


def _attempts(part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may be left of a part, each with the keyword that it lacks; "" stands for all but the type."""
    for lost in part:
        if lost in _KEYWORDS:
            yield lost, {key: value for key, value in part.items() if key != lost}
    yield "", {key: part[key] for key in ("type", "$defs", "definitions") if key in part}
    yield "", {key: part[key] for key in ("$defs", "definitions") if key in part}


def _child(part: dict[str, Any], below: Path) -> Any:
    key, *rest = below
    value = part[key]
    return value if not rest else value[int(rest[0]) if isinstance(value, list) else rest[0]]


def _fits_at(bare: dict[str, Any], below: Path, fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def fits_there(child: Any) -> bool:
        attempt = copied(bare)
        put(attempt, below, child)
        return fits(attempt)

    return fits_there
