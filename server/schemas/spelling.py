"""One spelling for what programs spell in many ways: types of Python and Gemini, OpenAPI's and older drafts' keywords.

A part keeps its meaning here, or gets the one that its author can only have had: `properties` without a type describe
an object, a key that is required without being described may have any value.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

TYPES = {
    name: json_type
    for json_type, names in {
        "string": "string str text",
        "integer": "integer int long",
        "number": "number float double decimal",
        "boolean": "boolean bool",
        "object": "object dict map mapping struct record",
        "array": "array list tuple set frozenset sequence",
        "null": "null none nonetype",
    }.items()
    for name in names.split()
}
_ANYTHING = ("any", "unknown", "mixed")
_TYPE = re.compile(r"(?:typing\.)?(\w+)")
_TYPE_OF = re.compile(r"(?:typing\.)?(\w+)\[(.+)\]", re.DOTALL)

COUNTS = "minLength maxLength minItems maxItems minProperties maxProperties".split()
LIMITS = "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()

_IMPLIED = {
    **dict.fromkeys(["properties", "patternProperties", "required"], "object"),
    **dict.fromkeys(["items", "prefixItems", "minItems", "maxItems"], "array"),
    **dict.fromkeys(["pattern", "minLength", "maxLength"], "string"),
    **dict.fromkeys(LIMITS, "number"),
}
ANNOTATIONS = "title description default examples example $comment deprecated readOnly writeOnly".split()
"""Keywords that say nothing of the document."""
_APPLICATORS = "$ref anyOf oneOf allOf if dependentSchemas".split()
_MAY_BE_NULL = ("const", "default", "example")


def spelled(part: Any) -> Any:
    """One part of a schema, without the parts within it."""
    if part is None:
        return {}
    if isinstance(part, str):
        part = {"type": part}
    if not isinstance(part, dict):
        return part
    part = {key: value for key, value in part.items() if value is not None or key in _MAY_BE_NULL}
    if part.get("not") in ({}, True):
        return False
    part.pop("$schema", None)  # what the drafts differ in is understood without it, and unknown ones are not fetched
    for change in (_spell_type, _spell_numbers, _spell_reference, _spell_required, _spell_names, _spell_object):
        change(part)
    return _with_null(part)


def _spell_type(part: dict[str, Any]) -> None:
    _spell_type_of_parts(part)
    if "type" in part:
        names = part["type"].split("|") if isinstance(part["type"], str) else part["type"]
        types = [_json_type(name) for name in (names if isinstance(names, list) else [names])]
        several = [name for index, name in enumerate(types) if name not in types[:index]]
        part["type"] = several[0] if len(several) == 1 else several
        if "any" in types:
            del part["type"]
    implied = {_IMPLIED[key] for key in part if key in _IMPLIED and part[key] != []}
    if len(implied) == 1 and part.keys().isdisjoint(("type", "const", "enum")):
        (part["type"],) = implied


def _spell_type_of_parts(part: dict[str, Any]) -> None:
    """Python's `list[int]` and `dict[str, int]`; what else has brackets is no type that anybody can be held to."""
    match = _TYPE_OF.fullmatch(part["type"].strip()) if isinstance(part.get("type"), str) else None
    kind = _json_type(match[1]) if match else None
    if match and kind == "array" and "," not in match[2]:
        part["type"] = kind
        part.setdefault("items", {"type": match[2]})
    elif match and kind == "object" and "," in match[2]:
        part["type"] = kind
        part.setdefault("additionalProperties", {"type": match[2].partition(",")[2]})


def _json_type(name: Any) -> Any:
    if name is None:
        return "null"
    match = _TYPE.fullmatch(name.strip()) if isinstance(name, str) else None
    word = match[1].lower() if match else ""
    return "any" if word in _ANYTHING else TYPES.get(word, name)


def _spell_numbers(part: dict[str, Any]) -> None:
    """Numbers that are texts, as Gemini's are, and whole numbers with a point."""
    for key in (*COUNTS, *LIMITS):
        value = part.get(key)
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", value):
            value = float(value) if "." in value else int(value)
        if isinstance(value, float) and value.is_integer() and key in COUNTS:
            value = int(value)
        if key in part:
            part[key] = value


def _spell_reference(part: dict[str, Any]) -> None:
    """Characters that a reference may not have, as in `#/$defs/List[int]`."""
    if isinstance(part.get("$ref"), str):
        part["$ref"] = quote(part["$ref"], safe="#/:?=&%~$+,;!'()*@")


def _spell_required(part: dict[str, Any]) -> None:
    """The list of draft 4 and later; a property of draft 3 says of itself whether it is required."""
    properties = part.get("properties")
    if isinstance(part.get("required"), bool):
        del part["required"]
    if not isinstance(properties, dict):
        return
    names = [name for name, child in properties.items() if isinstance(child, dict) and child.get("required") is True]
    if names and isinstance(required := part.get("required", []), list):
        known = texts_of(required)
        part["required"] = [*required, *(name for name in names if name not in known)]


def _spell_names(part: dict[str, Any]) -> None:
    """`propertyNames` in the words of properties, where they can be said so."""
    names = part.get("propertyNames")
    if not isinstance(names, dict):
        return
    kept = {key: value for key, value in names.items() if key not in ANNOTATIONS and (key, value) != ("type", "string")}
    is_bare = part.keys().isdisjoint(("properties", "patternProperties"))
    if not kept:
        del part["propertyNames"]
    elif is_bare and kept.keys() <= {"enum", "const"} and all(isinstance(name, str) for name in _allowed(kept)):
        del part["propertyNames"]
        value = part.get("additionalProperties", {})
        part |= {"properties": dict.fromkeys(_allowed(kept), value), "additionalProperties": False}
    elif is_bare and kept.keys() == {"pattern"} and isinstance(kept["pattern"], str):
        del part["propertyNames"]
        value = part.get("additionalProperties", {})
        part |= {"patternProperties": {kept["pattern"]: value}, "additionalProperties": False}


def _allowed(names: dict[str, Any]) -> list[Any]:
    if "const" in names:
        return [names["const"]]
    return names["enum"] if isinstance(names["enum"], list) else [names["enum"]]


def _spell_object(part: dict[str, Any]) -> None:
    """Properties that are described nowhere, and objects that describe none."""
    properties, required = part.get("properties", {}), part.get("required")
    if part.get("unevaluatedProperties") is False and part.keys().isdisjoint(_APPLICATORS):
        del part["unevaluatedProperties"]
        part.setdefault("additionalProperties", False)
    others = part.get("additionalProperties", False)
    if "additionalProperties" not in part and part.get("properties") == {}:
        part["additionalProperties"] = True
    elif others is False and part.keys() & {"properties", "additionalProperties"} and "patternProperties" not in part:
        if isinstance(required, list) and isinstance(properties, dict):
            missing = [name for name in required if isinstance(name, str) and name not in properties]
            part["properties"] = properties | {name: {} for name in missing}


def _with_null(part: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's `nullable`."""
    if part.pop("nullable", None) is not True:
        return part
    if not part.keys().isdisjoint(("$ref", "anyOf", "oneOf", "allOf")):
        definitions: dict[str, Any] = {key: part.pop(key) for key in ("$defs", "definitions") if key in part}
        return {"anyOf": [part, {"type": "null"}], **definitions}
    if "const" in part:
        part["enum"] = [part.pop("const")]
    if isinstance(part.get("enum"), list) and None not in part["enum"]:
        part["enum"] = [*part["enum"], None]
    if "type" in part:
        types = types_of(part)
        part["type"] = [*types, *(["null"] if "null" not in types else [])]
    return part


def texts_of(values: Any) -> set[str]:
    return {value for value in values if isinstance(value, str)} if isinstance(values, list) else set()


def types_of(part: dict[str, Any], *default: str) -> list[Any]:
    """The types that a part may have, as a list."""
    types = part.get("type", list(default))
    return types if isinstance(types, list) else [types]
