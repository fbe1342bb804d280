"""Random JSON schemas under which every document is short, whatever a model says: no text, list or number is open."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

NAMES = ["id", "name", "größe", "名前", "tags", "is_ok", "a b", 'qu"ote', "π", "child", "price", "emoji 🙂"]
WORDS = ["red", "grün", "青", "", 'x"y', "back\\slash", "tab\tnew\nline", "🙂", "null", "1"]
DEFINITIONS: Schema = {
    "colour": {"enum": ["red", "grün", "青"]},
    "point": {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99}, "ÿ": {"type": "boolean"}},
        "required": ["x"],
    },
    "pair": {"type": "array", "prefixItems": [{"$ref": "#/$defs/colour"}, {"$ref": "#/$defs/point"}], "items": False},
}


def random_schema(chance: random.Random) -> Schema:
    """An object at the top, nested up to three deep, with references."""
    return {**_object(chance, 3), "$defs": DEFINITIONS}


def _object(chance: random.Random, depth: int) -> Schema:
    names = chance.sample(NAMES, chance.randint(1, 4))
    required = [name for name in names if chance.random() < 0.6]
    properties = {name: _any(chance, depth - 1) for name in names}
    schema: Schema = {"type": "object", "properties": properties, "required": required}
    return schema | chance.choice([{}, {"additionalProperties": False}])


def _array(chance: random.Random, depth: int) -> Schema:
    least = chance.randint(0, 2)
    return {"type": "array", "items": _any(chance, depth - 1), "minItems": least, "maxItems": least + 2}


def _any(chance: random.Random, depth: int) -> Schema:
    if depth > 0 and chance.random() < 0.5:
        return chance.choice([_object, _array])(chance, depth)
    low = chance.randint(-1000, 1000)
    schemas: list[Schema] = [
        {"type": "string", "maxLength": chance.randint(0, 12)},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
        {"type": "string", "format": "date"},
        {"enum": chance.sample([*WORDS, 7, -1.5, None, True], 4)},
        {"const": chance.choice([*WORDS, 0, {"k": ["ü"]}])},
        {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 5000)},
        {"type": "number", "minimum": 0, "maximum": 100, "multipleOf": 0.25},
        {"type": ["boolean", "null"]},
        {"anyOf": [{"type": "boolean"}, {"type": "string", "minLength": 1, "maxLength": 3}]},
        {"$ref": "#/$defs/" + chance.choice(list(DEFINITIONS))},
    ]
    return chance.choice(schemas)
