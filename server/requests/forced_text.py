"""Text that a grammar forces, because nothing else may stand there: how long it can be, and how to force none of it.

llguidance writes such text out to its end for every mask, so that its tokens are those that the tokenizer would choose.
A grammar that forces very long texts is compiled without that: the output follows it all the same, but its tokens may
be other ones of the same text, and speculation does not know them beforehand.

The bound is an upper one. It may be too large for grammars that nobody writes, and is never too small.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.link.config import MAX_FORCED_CHARS

ELEMENT_CHARS = 24
"""Characters that cost as much as the beginning of an item or a property: 0.2 us a character, 5 us an item."""

_COUNT = re.compile(r"(.?)\{\s*(\d+)\s*(?:,\s*\d*\s*)?\}", re.DOTALL)
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")
"""The flag that allows white space and comments between a group and its count."""
_ANNOTATIONS = frozenset("type title description default examples deprecated readOnly writeOnly $comment".split())
_SCALARS = frozenset("string integer number boolean".split())
_BOUNDS = frozenset("minLength maxLength format minimum maximum exclusiveMinimum exclusiveMaximum".split())
_LITERAL = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')


@dataclass(frozen=True, slots=True)
class Run:
    """An upper bound of the text that is forced at a time within a value, and up to its ends."""

    length: float
    has_choice: bool = False
    """There is a place in every such value where something else could stand."""


def unforced(grammar: str) -> str:
    """llguidance's `grammar`, which forces nothing if it could force too long a text."""
    try:
        is_short = forced_chars(grammar) <= MAX_FORCED_CHARS
    except RecursionError:
        is_short = False
    return grammar if is_short else '%llguidance {"no_forcing": true}\n' + _as_lark(grammar)


def forcing_nothing(lark: str) -> str:
    """A client's grammar, whose rules may multiply: no bound of what it forces is known."""
    return f'{lark}\n%llguidance {{"no_forcing": true}}\n'  # the last of several directives counts


def forced_chars(grammar: str) -> float:
    """An upper bound of the characters that llguidance's `grammar` forces at a time."""
    schema, lark = _parts(grammar)
    if schema is not None:
        return SchemaRuns(schema).run(schema).length
    schemas = list(_schemas_within(lark))
    if not schemas:
        return regex_chars(lark)
    literals = (len(literal) for literal in _LITERAL.findall(_without_schemas(lark)))
    # The end of one call of a function and the beginning of the next may both be forced.
    return 2 * max(SchemaRuns(schema).run(schema).length for schema in schemas) + 2 * max(literals, default=0)


def regex_chars(pattern: str) -> float:
    """The same for a regular expression: its own length, and the least times for which its parts are repeated."""
    if _VERBOSE.search(pattern):
        return math.inf
    length, factor = float(len(pattern)), 1.0
    for match in _COUNT.finditer(pattern):
        before, count = match[1], int(match[2])
        if before and before not in ")}?*+":  # a single character or class
            length += count
        else:
            factor *= max(1, count)
    return length * factor


class SchemaRuns:
    """The runs of a schema and of all within it."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._references: dict[str, Run] = {}

    def run(self, schema: Any) -> Run:
        if not isinstance(schema, dict):
            return Run(1.0, has_choice=schema is True)
        if _is_open(schema):
            return Run(1.0, has_choice=True)
        parts = [self._value(schema), self._object(schema), self._array(schema), self._alternatives(schema)]
        if isinstance(schema.get("$ref"), str):
            parts.append(self._reference(schema["$ref"]))
        return Run(sum(part.length for part in parts), any(part.has_choice for part in parts))

    def _value(self, schema: dict[str, Any]) -> Run:
        values = [schema["const"]] if "const" in schema else schema.get("enum", [])
        texts = {json.dumps(value): _value_chars(value) for value in values}
        length = max(texts.values(), default=4.0)
        if isinstance(schema.get("pattern"), str):
            length += max(regex_chars(schema["pattern"]), _number(schema.get("minLength")))
        has_choice = len(texts) > 1 and schema.keys() <= _ANNOTATIONS | {"enum"}
        return Run(length, has_choice)

    def _object(self, schema: dict[str, Any]) -> Run:
        """Properties come one after the other; one with a choice ends a run and begins another one."""
        properties = _mapping(schema.get("properties"))
        longest = current = 0.0
        has_choice = False
        for name, value in properties.items():
            run = self.run(value)
            current += len(json.dumps(name)) + ELEMENT_CHARS + run.length
            longest = max(longest, current)
            if run.has_choice:
                has_choice, current = True, run.length
        patterns = _mapping(schema.get("patternProperties"))
        others = sum(regex_chars(name) + self.run(value).length for name, value in patterns.items())
        others += self.run(schema.get("additionalProperties", False)).length + ELEMENT_CHARS
        return Run(longest + others * max(1.0, _number(schema.get("minProperties"))), has_choice)

    def _array(self, schema: dict[str, Any]) -> Run:
        first = [self.run(item) for item in _sequence(schema.get("prefixItems"))]
        items = schema.get("items", schema.get("additionalItems", False))
        item = self.run(items) if not isinstance(items, list) else Run(sum(self.run(each).length for each in items))
        count = max(1.0, _number(schema.get("minItems")))
        repeated = 2 * item.length if item.has_choice else count * (item.length + ELEMENT_CHARS)
        return Run(sum(run.length + ELEMENT_CHARS for run in first) + repeated)

    def _alternatives(self, schema: dict[str, Any]) -> Run:
        length, has_choice = 0.0, False
        for keyword in ("anyOf", "oneOf"):
            alternatives = _sequence(schema.get(keyword))
            length += max((self.run(each).length for each in alternatives), default=0.0)
            has_choice |= any(isinstance(each, dict) and _is_open(each) for each in alternatives)
        length += sum(self.run(each).length for each in _sequence(schema.get("allOf")))
        is_alone = schema.keys() <= _ANNOTATIONS | {"anyOf"}
        return Run(length, has_choice and is_alone)

    def _reference(self, pointer: str) -> Run:
        """The run of what a pointer within the schema names. A value within itself adds nothing to its own run."""
        if pointer not in self._references:
            self._references[pointer] = Run(0.0)
            self._references[pointer] = self.run(_resolve(self._root, pointer))
        return self._references[pointer]


def _is_open(schema: dict[str, Any]) -> bool:
    """True for a schema that surely leaves a choice: a scalar type without bounds, or with room between them."""
    types = schema.get("type", "string")
    is_scalar = types in _SCALARS if isinstance(types, str) else bool(set(map(str, _sequence(types))) & _SCALARS)
    if not is_scalar or not schema.keys() <= _ANNOTATIONS | _BOUNDS:
        return False
    low = max(_number(schema.get(key), -math.inf) for key in ("minimum", "exclusiveMinimum"))
    high = min(_number(schema.get(key), math.inf) for key in ("maximum", "exclusiveMaximum"))
    max_length = _number(schema.get("maxLength"), math.inf)
    return high - low >= 3 and max_length >= max(1.0, _number(schema.get("minLength")))


def _value_chars(value: Any) -> float:
    if isinstance(value, dict):
        return 2.0 + sum(len(json.dumps(key)) + _value_chars(item) + ELEMENT_CHARS for key, item in value.items())
    if isinstance(value, list):
        return 2.0 + sum(_value_chars(item) + ELEMENT_CHARS for item in value)
    return float(len(json.dumps(value)))


def _number(value: Any, default: float = 0.0) -> float:
    return float(min(value, 1e9)) if isinstance(value, int | float) else default


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolve(root: dict[str, Any], pointer: str) -> Any:
    """What a pointer names; the whole schema if it has another form, which bounds whatever it names."""
    part: Any = root
    for name in pointer.removeprefix("#").split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        if not isinstance(part, dict) or key not in part:
            return root
        part = part[key]
    return part


def _parts(grammar: str) -> tuple[dict[str, Any] | None, str]:
    """A grammar's schema, or None and its text in llguidance's own language."""
    if not grammar.startswith("{"):
        return None, grammar
    part = json.loads(grammar)["grammars"][0]
    return part["json_schema"], part["lark_grammar"] or ""


def _as_lark(grammar: str) -> str:
    schema, lark = _parts(grammar)
    return lark if schema is None else f"start: %json {json.dumps(schema)}"


def _schemas_within(lark: str) -> Iterator[dict[str, Any]]:
    for begin, end in _places_of_schemas(lark):
        yield json.loads(lark[begin:end])


def _without_schemas(lark: str) -> str:
    kept, last = "", 0
    for begin, end in _places_of_schemas(lark):
        kept, last = kept + lark[last:begin], end
    return kept + lark[last:]


def _places_of_schemas(lark: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each schema in a grammar that `server.chat.tools` has written."""
    mark, decoder, end = "%json ", json.JSONDecoder(), 0
    while (begin := lark.find(mark, end)) >= 0:
        begin += len(mark)
        try:
            _, end = decoder.raw_decode(lark, begin)
        except ValueError:  # these words stand in a literal
            end = begin
            continue
        yield begin, end
