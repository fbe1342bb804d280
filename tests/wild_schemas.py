"""120 schemas as people's programs write them: pydantic's from types, the others in the style of their generators."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import pathlib
import re
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import pydantic
import typing_extensions
from annotated_types import Ge, Len, Lt, MultipleOf
from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter

T = TypeVar("T")
Schema = dict[str, Any]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Price(BaseModel):
    """A price in some currency."""

    amount: decimal.Decimal
    currency: Literal["EUR", "USD"] = "EUR"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int
    b: str | None = None


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Tree(BaseModel):
    name: str
    children: list[Tree] = []


class Person(BaseModel):
    name: str = Field(min_length=1, max_length=40, examples=["Ann"])
    born: datetime.date
    home: pathlib.Path | None = None
    tags: set[str] = set()
    level: Level = Level.LOW


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Ge(1), Lt(10)]


class Dog(BaseModel):
    kind: Literal["dog"]
    owner: Person | None


class Pet(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")


class Page(BaseModel, Generic[T]):
    items: list[T]
    next: str | None


class Tags(RootModel[list[str]]):
    pass


class Empty(BaseModel):
    pass


class Movie(typing_extensions.TypedDict, total=False):
    title: typing_extensions.Required[str]
    year: int


class Point(NamedTuple):
    x: int
    y: float = 0.0


@dataclass
class Box:
    width: float
    lid: bool = True


class Extra(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"a": 1}], "$anchor": "extra", "if": {}, "x-order": 1})
    a: Annotated[int, Field(json_schema_extra={"nullable": True, "format": "int32"})]


class Secret(BaseModel):
    key: pydantic.SecretStr
    data: bytes
    file: pydantic.FilePath
    encoded: pydantic.Base64Bytes
    pattern: re.Pattern[str]


PYDANTIC: list[Any] = [
    int,
    float,
    bool,
    str,
    bytes,
    None,
    Any,
    dict,
    list,
    set,
    tuple,
    decimal.Decimal,
    uuid.UUID,
    pathlib.Path,
    re.Pattern[str],
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    ipaddress.IPv4Address,
    ipaddress.IPv6Network,
    pydantic.AnyUrl,
    pydantic.HttpUrl,
    pydantic.SecretStr,
    pydantic.Base64Str,
    pydantic.Json[list[int]],
    pydantic.ByteSize,
    pydantic.PastDate,
    set[int],
    frozenset[str],
    tuple[int, str],
    tuple[int, ...],
    deque[int],
    Sequence[bool],
    dict[str, int],
    dict[int, str],
    dict[Literal["a", "b"], int],
    dict[Colour, float],
    dict[Annotated[str, Len(3)], int],
    int | str | None,
    list[list[int]],
    Annotated[list[int], Len(1, 3)],
    Literal["a", 1, None, True],
    Annotated[int, MultipleOf(5)],
    Annotated[float, Ge(0), Lt(1)],
    Annotated[decimal.Decimal, Ge(0)],
    Annotated[str, Field(pattern=r"^[a-z]+$")],
    Annotated[decimal.Decimal, Field(max_digits=5, decimal_places=2)],
    Colour,
    Level,
    Price,
    Strict,
    Loose,
    Tree,
    Person,
    Pet,
    Page[Price],
    Page[int],
    Tags,
    Empty,
    Movie,
    Point,
    Box,
    Extra,
    Secret,
    list[Pet],
    dict[str, Tree],
    Page[Page[Colour]],
]


def _object(required: list[str] | None = None, **properties: Any) -> Schema:
    return {"type": "object", "properties": properties} | ({} if required is None else {"required": required})


_STRING = {"type": "string"}
_DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
_DRAFT_2020 = {"$schema": "https://json-schema.org/draft/2020-12/schema", "additionalProperties": False}

DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
"""What pydantic says of decimal numbers since 2.12: look-around, which regular languages lack."""

OLDER_PYDANTIC: list[Schema] = [
    _object(["a"], a={"anyOf": [{"type": "number"}, {"type": "string", "pattern": DECIMAL}]}),
    _object(a={"allOf": [{"$ref": "#/definitions/B"}]}) | {"definitions": {"B": {"enum": ["x"], "type": "string"}}},
    {"type": "array", "items": [{"type": "integer"}, _STRING], "minItems": 2, "maxItems": 2},
    {"type": "integer", "exclusiveMinimum": 0, "env_names": ["a"]},
]

ZOD: list[Schema] = [
    {**_object(["a"], a={"type": "string", "format": "cuid2", "pattern": "^[0-9a-z]+$"}), **_DRAFT_2020},
    {**_object(["a"], a={"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991}), **_DRAFT_2020},
    {**_object(["r"], r={"type": "object", "propertyNames": _STRING, "additionalProperties": {}}), **_DRAFT_2020},
    {
        **_object(
            r={"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"type": "number"}}
        )
    },
    {**_object(["a"], a={"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.5}), **_DRAFT_7},
    {**_object(a={"not": {}}, b=_STRING), "additionalProperties": {"not": {}}, **_DRAFT_7},
    {"$ref": "#/definitions/Node", "definitions": {"Node": _object(["v"], v={}, next={"$ref": "#/definitions/Node"})}},
    {**_DRAFT_7, "anyOf": [_object(["k"], k={"type": "string", "const": kind}) for kind in ("a", "b")]},
    {**_object(t={"type": "array", "items": [_STRING, {"type": "number"}], "minItems": 2, "maxItems": 2}), **_DRAFT_7},
    {**_object(e={"type": "string", "format": "email", "pattern": r"^(?!\.)(?!.*\.\.)[\w.+-]+@\w+\.\w{2,}$"})},
    {"allOf": [_object(["a"], a=_STRING), _object(["b"], b={"type": "integer"})], "unevaluatedProperties": False},
    {**_object(s={"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3]}}), **_DRAFT_7},
    {**_object(f={"type": "string", "format": "binary", "contentEncoding": "binary"}), **_DRAFT_2020},
    {**_object(n={"anyOf": [{"type": "string", "format": "jwt"}, {"type": "null"}]}), **_DRAFT_2020},
    {"type": "string", "format": "ipv4", "pattern": r"^(?:\d{1,3}\.){3}\d{1,3}$"},
    {**_object(a={"type": "string", "pattern": r"^[A-Z][^\x00-\x1F]*$", "default": ""}), "title": "A"},
]

GEMINI: list[Schema] = [
    {"type": "OBJECT", "properties": {"a": {"type": "STRING", "nullable": True}}, "propertyOrdering": ["a"]},
    {"type": "ARRAY", "items": {"type": "INTEGER", "format": "int32"}, "minItems": "1", "maxItems": "3"},
    {
        "type": "OBJECT",
        "properties": {"e": {"type": "STRING", "format": "enum", "enum": ["A", "B"]}},
        "required": ["e"],
    },
    {"type": "OBJECT", "properties": {"x": {"type": "NUMBER", "format": "double", "minimum": "0"}}},
    {"anyOf": [{"type": "STRING"}, {"type": "NULL"}], "nullable": True},
    {"type": "OBJECT", "properties": {"o": {"type": "OBJECT", "nullable": True}}, "required": None},
    {"type": "BOOLEAN", "enum": None, "items": None, "properties": None, "format": None},
    {"type": "TYPE_UNSPECIFIED", "description": "anything"},
]

MCP: list[Schema] = [
    _object(),
    {"type": "object"},
    {"properties": {"path": _STRING}, "required": ["path"]},
    {"type": "object", "properties": None, "required": None},
    {**_object(["path", "mode"], path=_STRING), "additionalProperties": False, **_DRAFT_7},
    {"type": ["object", "null"], "properties": {"q": _STRING}, "required": ["q"]},
    _object(query={"type": "str"}, limit={"type": "int"}, ratio={"type": "float"}, flag={"type": "bool"}),
    _object(a={"type": "any"}, b={"type": "list"}, c={"type": "dict"}, d={"type": "None"}, e={"type": "list[str]"}),
    _object(a={"type": "string | null"}, b={"type": "Optional[str]"}, c="string", d=None),
    _object(a={"type": "string", "required": True}, b={"type": "string", "required": False}),
    {**_object(a=_STRING, b=_STRING), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {**_object(a=_STRING, b=_STRING), "dependentRequired": {"a": ["b"]}, "minProperties": 1},
    {**_object(a=_STRING), "if": _object(a={"const": "x"}), "then": {"required": ["b"]}, "else": {}},
    {**_object(a={"$ref": "#/$defs/List[int]"}), "$defs": {"List[int]": {"type": "array", "items": {"type": "int"}}}},
    _object(a={"$ref": "https://example.com/schemas/a.json"}, b={"$ref": "#/$defs/absent"}, c={"$ref": "other.json"}),
    {
        "$id": "https://example.com/tool.json",
        **_object(a={"$ref": "https://example.com/tool.json#/$defs/A"}),
        "$defs": {"A": _STRING},
    },
    {"$schema": "https://example.com/own-dialect", "$id": "not a uri %%", "type": "object"},
    _object(file={"type": "string", "contentMediaType": "image/png", "contentEncoding": "base64", "format": "byte"}),
]

GATEWAYS: list[Schema] = [
    {"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 9, "exclusiveMaximum": False},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"type": "number", "minimum": -1.7976931348623157e308},
    {"type": "string", "enum": []},
    {"enum": ["a", "b", None], "nullable": True, "type": "string"},
    {"const": "a", "enum": ["a", "b"]},
    {"const": "c", "enum": ["a", "b"]},
    {"type": "array", "contains": _STRING, "minContains": 2, "items": True},
    {"type": "array", "minItems": 3, "maxItems": 1, "items": _STRING},
    {"type": "string", "pattern": r"^(\w)\1$", "minLength": 2.0},
    {"type": "string", "pattern": "^[^[]+$"},
    {"type": "string", "pattern": r"\bword\b"},
    {"type": "object", "patternProperties": {"^(?!x-)": _STRING}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^x-": _STRING}, "additionalProperties": False},
    {"$ref": "#/$defs/A", "description": "said again", "default": {}, "$defs": {"A": _object(a=_STRING)}},
    {"oneOf": [{"$ref": "#/definitions/A"}], "discriminator": {"propertyName": "a"}, "definitions": {"A": _object()}},
    {"type": "object", "additionalProperties": {"$ref": "#"}, "not": {"required": ["b"]}},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": ["string", None, "string"], "title": 3},
    {"type": "object", "properties": {"a": {}, "b": True, "c": False}, "required": ["a", "b"], "examples": "none"},
]

SCHEMAS: dict[str, Schema] = {
    **{f"pydantic {index} {type_}": TypeAdapter(type_).json_schema() for index, type_ in enumerate(PYDANTIC)},
    **{f"older pydantic {index}": schema for index, schema in enumerate(OLDER_PYDANTIC)},
    **{f"zod {index}": schema for index, schema in enumerate(ZOD)},
    **{f"gemini {index}": schema for index, schema in enumerate(GEMINI)},
    **{f"mcp {index}": schema for index, schema in enumerate(MCP)},
    **{f"gateway {index}": schema for index, schema in enumerate(GATEWAYS)},
}
