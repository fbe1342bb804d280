"""What llguidance cannot hold a model to is left open, part by part: a table of keywords, and a name for each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from server.schemas.parts import Path, changed, note, walk
from server.schemas.spelling import ANNOTATIONS, COUNTS, LIMITS, TYPES, spelled, texts_of, types_of

FORMATS = frozenset("date time date-time duration email hostname ipv4 ipv6 uri uuid".split())
"""Formats of texts that llguidance knows."""

_UNSUPPORTED_REGEX = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?(?:[=!>]|<[=!])|\\(?:[1-9kbBZ]))")
"""Look-around, atomic groups, references back, borders of words."""
_URI = re.compile(r"(?:[\w.~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*", re.ASCII)
_LARGE = 10**18
"""llguidance's numbers have 64 bits, and it writes a regular expression for a range of them."""

Keyword = Callable[[Any, dict[str, Any]], bool]
"""Says of a keyword's value and the part around it whether the model can be held to it."""


def _is_list_of_parts(value: Any, _: dict[str, Any]) -> bool:
    return isinstance(value, list) and value != []


def _is_map(value: Any, _: dict[str, Any]) -> bool:
    return isinstance(value, dict)


def _is_count(value: Any, part: dict[str, Any]) -> bool:
    return type(value) is int and 0 <= value < _LARGE


def _is_limit(value: Any, _: dict[str, Any]) -> bool:
    return isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < _LARGE)


def _is_count_of_keys(value: Any, part: dict[str, Any]) -> bool:
    """llguidance counts keys where none of the declared ones may be left out."""
    properties, required = part.get("properties"), part.get("required")
    names = properties if isinstance(properties, dict) else {}
    return _is_count(value, part) and names.keys() <= texts_of(required)


def _is_type(value: Any, _: dict[str, Any]) -> bool:
    names = value if isinstance(value, list) else [value]
    return names != [] and all(isinstance(name, str) and TYPES.get(name) == name for name in names)


def _is_regex(value: Any, _: dict[str, Any] | None = None) -> bool:
    return isinstance(value, str) and _UNSUPPORTED_REGEX.search(value) is None


def _is_format(value: Any, part: dict[str, Any]) -> bool:
    """A format is of texts. What Gemini and OpenAPI say of numbers, llguidance does not read."""
    return isinstance(value, str) and (value in FORMATS or "string" not in types_of(part, "string"))


def _never(value: Any, part: dict[str, Any]) -> bool:
    return False


HELD: dict[str, Keyword] = {
    "type": _is_type,
    "enum": _is_list_of_parts,
    "properties": _is_map,
    "patternProperties": _is_map,
    "$defs": _is_map,
    "definitions": _is_map,
    "required": lambda value, part: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "anyOf": _is_list_of_parts,
    "oneOf": _is_list_of_parts,
    "allOf": _is_list_of_parts,
    "prefixItems": lambda value, part: isinstance(value, list),
    "pattern": _is_regex,
    "format": _is_format,
    **dict.fromkeys(COUNTS, _is_count),
    **dict.fromkeys(LIMITS, _is_limit),
    "minProperties": _is_count_of_keys,
    "maxProperties": _is_count_of_keys,
    **dict.fromkeys("dependencies dependentRequired dependentSchemas not contains uniqueItems".split(), _never),
    **dict.fromkeys("propertyNames unevaluatedItems unevaluatedProperties".split(), _never),
    **dict.fromkeys("$dynamicRef $recursiveRef if".split(), _never),
}
"""Keyword -> whether the model can be held to what it says. Keywords that are not here say nothing of the document."""

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "not": (False,),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "propertyNames": (True, {}),
    "allOf": ([],),
}
"""Keyword -> values with which it says nothing of the document."""
_PARTS_OF_OTHERS = "then else minContains maxContains".split()


def _says_nothing(key: str, value: Any) -> bool:
    return value in WITHOUT_EFFECT.get(key, ())


def without_idle_keywords(schema: Any) -> Any:
    """The schema without keywords that ask for nothing, which llguidance might refuse. Raises RecursionError."""

    def change(part: Any, _: Path) -> Any:
        if not isinstance(part, dict):
            return part
        return {key: value for key, value in part.items() if not _says_nothing(key, value)}

    return changed(schema, change)


def _forbids_required(original: Any, part: dict[str, Any]) -> bool:
    """Whether an object requires keys that it forbids: the spelled part has them as properties."""
    if not isinstance(original, dict) or original.get("additionalProperties") is not False:
        return False
    before, after = original.get("properties") or {}, part.get("properties")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return False
    return not texts_of(original.get("required")).isdisjoint(after.keys() - before.keys())


class Opening:
    """Spells a schema and leaves open in it what the table says."""

    def __init__(self, schema: dict[str, Any], *, is_object: bool = False) -> None:
        """`is_object`: only objects count, as for the arguments of a function."""
        self.left_open: list[str] = []
        """Where the schema says something that the model is not held to."""
        self._schema = schema
        self._is_object = is_object
        parts = list(walk(schema))
        self._anchors = {part.get("$anchor") for part in parts if isinstance(part.get("$anchor"), str)}
        self._ids = {part["$id"].rstrip("#") for part in parts if isinstance(part.get("$id"), str)}

    def opened(self) -> Any:
        """Raises RecursionError."""
        return changed(self._schema, self._open)

    def _open(self, part: Any, path: Path) -> Any:
        original, part = part, spelled(self._with_resolved_names(part))
        if isinstance(part, bool):
            return part
        if not isinstance(part, dict):
            note(self.left_open, path)
            return {}
        if self._is_object and not path:
            self._make_object(part)
        if _forbids_required(original, part):
            note(self.left_open, (*path, "additionalProperties"))
        kept = {key: value for key, value in part.items() if self._keep(key, value, part, path)}
        if isinstance(kept.get("patternProperties"), dict):
            self._open_patterns(kept, path)
        return kept

    def _with_resolved_names(self, part: Any) -> Any:
        """The part with the names of its properties themselves where it refers to them, as pydantic does."""
        names = part.get("propertyNames") if isinstance(part, dict) else None
        target = self._target(names.get("$ref")) if isinstance(names, dict) else None
        return part | {"propertyNames": target} if isinstance(target, dict) else part

    def _make_object(self, part: dict[str, Any]) -> None:
        """Leave open what allows no object."""
        if "object" not in types_of(part, "object"):
            note(self.left_open, ("type",))
        part["type"] = "object"
        if not isinstance(part.get("const", {}), dict):
            del part["const"]
            note(self.left_open, ("const",))
        if isinstance(part.get("enum"), list):
            part["enum"] = [value for value in part["enum"] if isinstance(value, dict)]

    def _keep(self, key: str, value: Any, part: dict[str, Any], path: Path) -> bool:
        if key in ANNOTATIONS or key in _PARTS_OF_OTHERS or _says_nothing(key, value):
            return False
        if key == "$id":
            return isinstance(value, str) and _URI.fullmatch(value) is not None
        if key not in HELD and key != "$ref":
            return True
        is_held = self._leads_somewhere(value) if key == "$ref" else HELD[key](value, part)
        if not is_held:
            note(self.left_open, (*path, key))
        return is_held

    def _open_patterns(self, part: dict[str, Any], path: Path) -> None:
        """Keys that a pattern describes may have any value if nobody can say which keys those are."""
        patterns = part["patternProperties"]
        lost = dict.fromkeys(pattern for pattern in patterns if not _is_regex(pattern))
        if lost:
            for pattern in lost:
                note(self.left_open, (*path, "patternProperties", pattern))
            part["patternProperties"] = {key: value for key, value in patterns.items() if key not in lost}
            part["additionalProperties"] = True

    def _leads_somewhere(self, reference: Any) -> bool:
        """Whether a reference stays within the schema and finds something else than references in a circle."""
        seen: set[str] = set()
        while isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            document, _, fragment = reference.partition("#")
            if document:
                return document in self._ids
            if fragment and not fragment.startswith("/"):
                return fragment in self._anchors
            target = self._target(reference)
            if not isinstance(target, dict):
                return isinstance(target, bool)
            if "$ref" not in target:
                return True
            reference = target["$ref"]
        return False

    def _target(self, reference: Any) -> Any:
        """What a pointer such as `#/$defs/Colour` leads to; None if that is nothing."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        target: Any = self._schema
        for key in unquote(reference[1:]).split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                is_index = key.isdecimal() and len(key) < 10 and int(key) < len(target)
                target = target[int(key)] if is_index else None
            else:
                target = target.get(key) if isinstance(target, dict) else None
        return target
