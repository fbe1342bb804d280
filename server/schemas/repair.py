"""The last resort: where llguidance refuses a schema nonetheless, as little of it as possible is left open.

The part without which the schema compiles is sought from the outside in, by halves. Where it takes several, all parts
are opened and put back. What cannot stay as it is loses a keyword, or all but its type, or is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from server.schemas.opening import HELD
from server.schemas.parts import Path, children, copied, pointer, put

_STRUCTURE = "type properties patternProperties items prefixItems anyOf oneOf allOf $defs definitions".split()
_KEYWORDS = {*HELD, "$ref", "const", "additionalProperties"}.difference(_STRUCTURE)

Place = tuple[Path, Any]
"""A child of a part, and its path from there."""


def repaired(part: Any, fits: Callable[[Any], bool], path: Path = ()) -> tuple[Any, list[str]]:
    """The part as far as it `fits`, and where it is left open.

    `fits`: whether the whole schema compiles with this in the place of the part.
    """
    if fits(part):
        return part, []
    if not isinstance(part, dict):
        return {}, [pointer(path)]
    culprit = _only_culprit(part, fits)
    if culprit is None:
        return _put_together(part, fits, path)
    below, child = culprit
    whole, left_open = repaired(child, _fits_at(part, below, fits), path + below)
    return _with_child(part, below, whole), left_open


def _only_culprit(part: dict[str, Any], fits: Callable[[Any], bool]) -> Place | None:
    """The child without which the part fits, definitions before what refers to them; None if there is no such."""
    group = [(below, child) for below, child in reversed(children(part)) if isinstance(child, dict)]
    while len(group) > 1:
        half = group[: len(group) // 2]
        group = half if fits(_without(part, half)) else group[len(half) :]
    return group[0] if group and fits(_without(part, group)) else None


def _put_together(part: dict[str, Any], fits: Callable[[Any], bool], path: Path) -> tuple[dict[str, Any], list[str]]:
    bare = _without(part, [place for place in children(part) if isinstance(place[1], dict)])
    left_open: list[str] = []
    if not fits(bare):
        key, bare = next(((key, attempt) for key, attempt in _attempts(bare) if fits(attempt)), ("", {}))
        left_open.append(pointer((*path, key) if key else path))
    kept = {below for below, _ in children(bare)}
    bare, names = _put_back(bare, [place for place in children(part) if place[0] in kept], fits, path)
    return bare, left_open + names


def _put_back(
    bare: dict[str, Any], group: list[Place], fits: Callable[[Any], bool], path: Path
) -> tuple[dict[str, Any], list[str]]:
    """`bare` with the children of the group, as far as they fit."""
    attempt = copied(bare)
    for below, child in group:
        put(attempt, below, child)
    if fits(attempt):
        return attempt, []
    if len(group) == 1:
        ((below, child),) = group
        whole, left_open = repaired(child, _fits_at(bare, below, fits), path + below)
        return _with_child(bare, below, whole), left_open
    half = len(group) // 2
    bare, left_open = _put_back(bare, group[:half], fits, path)
    bare, more = _put_back(bare, group[half:], fits, path)
    return bare, left_open + more


def _without(part: dict[str, Any], group: list[Place]) -> dict[str, Any]:
    part = copied(part)
    for below, _ in group:
        put(part, below, _stand_in(part, below))
    return part


def _with_child(part: dict[str, Any], below: Path, child: Any) -> dict[str, Any]:
    part = copied(part)
    put(part, below, child)
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


def _fits_at(part: dict[str, Any], below: Path, fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda child: fits(_with_child(part, below, child))
