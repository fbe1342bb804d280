"""The parts of a schema, each a schema itself: which keywords hold them, how all are changed, how one is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

Path = tuple[str, ...]
"""Keys from the root to a place within a schema."""

BY_NAME = "properties patternProperties $defs definitions".split()
LISTS = "anyOf oneOf allOf prefixItems items".split()
SINGLE = "items additionalProperties additionalItems".split()

MAX_NAMED_CHARS = 1000
MAX_KEY_CHARS = 100
MAX_PLACES = 100
AND_MORE = "..."
"""Stands for the places that a list has no room for."""


def children(part: Any) -> list[tuple[Path, Any]]:
    """The parts directly within `part`, each with its path from there. Constants and examples are no parts.

    Definitions come last: others refer to them.
    """
    if not isinstance(part, dict):
        return []
    places: list[tuple[Path, Any]] = []
    for key in sorted(part, key=lambda key: key in ("$defs", "definitions")):
        value = part[key]
        if key in BY_NAME and isinstance(value, dict):
            places += [((key, name), child) for name, child in value.items()]
        elif key in LISTS and isinstance(value, list):
            places += [((key, str(index)), child) for index, child in enumerate(value)]
        elif key in SINGLE:
            places.append(((key,), value))
    return places


def copied(part: dict[str, Any]) -> dict[str, Any]:
    """A copy in which children can be put without a change to `part`."""
    return {
        key: value.copy() if key in {*BY_NAME, *LISTS} and isinstance(value, dict | list) else value
        for key, value in part.items()
    }


def put(part: dict[str, Any], path: Path, child: Any) -> None:
    """Make `child` the child of `part` at `path`."""
    *keys, last = path
    container: Any = part[keys[0]] if keys else part
    container[int(last) if isinstance(container, list) else last] = child


def changed(part: Any, change: Callable[[Any, Path], Any], path: Path = ()) -> Any:
    """The schema with each part changed, the outer ones first, and nothing shared with the schema that came in."""
    part = change(part, path)
    if not isinstance(part, dict):
        return part
    part = copied(part)
    for below, child in children(part):
        put(part, below, changed(child, change, path + below))
    return part


def walk(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and every part within it that is an object."""
    stack = [schema]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            yield part
            stack += [child for _, child in children(part)]


def pointer(path: Path) -> str:
    """The place as a URI fragment in ASCII, as `$ref` has it; of a long key only the beginning."""
    keys = (key[:MAX_KEY_CHARS].replace("~", "~0").replace("/", "~1") for key in path)
    return "#" + "".join("/" + quote(key, safe="$") for key in keys)


def note(places: list[str], path: Path) -> None:
    """Add the place to the list, unless that is full already: nobody reads thousands of them."""
    if len(places) < MAX_PLACES:
        places.append(pointer(path))
    elif len(places) == MAX_PLACES:
        places.append(AND_MORE)


def named(pointers: Sequence[str]) -> str:
    """A list of bounded length of the places."""
    text = ", ".join(pointers)
    if len(text) <= MAX_NAMED_CHARS:
        return text
    return ", ".join(filter(None, [text[: MAX_NAMED_CHARS - len(AND_MORE) - 2].rpartition(", ")[0], AND_MORE]))
