"""Reading JSON the way TGI's serde does: strict types, Rust's number ranges, and its words for what is wrong.

Knows nothing of the requests themselves: `server.requests.native` builds them from these pieces.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from server.errors import INVALID_VALUE

_FLOAT32 = struct.Struct("<f")

_EXPECTED = {
    "string_type": "a string",
    "bool_type": "a boolean",
    "list_type": "a sequence",
    "dict_type": "a map",
}
"""pydantic's error type -> what serde would say it expected."""


class _FailFast:
    """An annotation of a list: the first wrong item ends its reading. pydantic's own has no hash, as unions need."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        assert schema["type"] == "list"
        return {**schema, "fail_fast": True}


Item = TypeVar("Item")
ListOf = Annotated[list[Item], _FailFast()]
"""A list of which nothing is read after the first wrong item."""


def max_items(limit: int) -> BeforeValidator:
    """An annotation of a list: one that has more items is refused before any of them is read."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > limit:
            raise wrong(f"invalid length {len(value)}, expected at most {limit} items")
        return value

    return BeforeValidator(check)


MAX_SHOWN_CHARS = 1_000
"""The length of a client's text in a refusal."""


class RepeatedKeys(dict[str, Any]):
    """A JSON object in which some keys came more than once; `repeated` names them, the last value is kept."""

    repeated: frozenset[str] = frozenset()


def wrong(reason: str) -> PydanticCustomError:
    """An error whose text is final: `describe` passes it on as it is."""
    return PydanticCustomError("serde", "{reason}", {"reason": reason})


def wrong_within(path: str, error: WrongShape) -> PydanticCustomError:
    """The error of a value that is read by itself and stands at `path`, within what a validator reads."""
    location, param = (_joined(path, place) for place in (error.location, error.param))
    return PydanticCustomError(
        "serde", "{reason}", {"reason": error.reason, "location": location, "param": param, "code": error.code}
    )


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """A ValidationError of the block is one of the value at `path`, within what a validator reads."""
    try:
        yield
    except ValidationError as error:
        raise wrong_within(path, describe(error)) from None


def wrong_at(path: str, reason: str, code: str = INVALID_VALUE) -> PydanticCustomError:
    """The error of the value at `path`, within what a validator reads."""
    return wrong_within(path, WrongShape(reason, "", "", code))


def missing(path: str, field: str) -> PydanticCustomError:
    """The error of a field that lacks at `path`, within what a validator reads."""
    return wrong_within(path, WrongShape(f"missing field `{field}`", "", field, MISSING))


def unexpected(value: object) -> str:
    """serde's name of a value that it did not expect."""
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean `{str(value).lower()}`"
        case int():
            return f"integer `{value}`"
        case float():
            return f"floating point `{value}`"
        case str():
            return f"string {json.dumps(shortened(value), ensure_ascii=False)}"
        case list():
            return "sequence"
    return "map"


def shortened(text: str) -> str:
    """The beginning of a text that is too long to be shown."""
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def _integer(name: str, low: int, high: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if type(value) is not int:  # bool is an int to isinstance
            raise wrong(f"invalid type: {unexpected(value)}, expected {name}")
        if not low <= value <= high:
            raise wrong(f"invalid value: {unexpected(value)}, expected {name}")
        return value

    return read


def round_to_f32(value: float) -> float:
    """The nearest single-precision number, as TGI holds every float."""
    try:
        (rounded,) = _FLOAT32.unpack(_FLOAT32.pack(value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return float(rounded)


def read_f32(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(f"invalid type: {unexpected(value)}, expected f32")
    return round_to_f32(value)


def _in_untagged_enum(name: str) -> Callable[[Any, ValidatorFunctionWrapHandler], Any]:
    def read(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise wrong(f"data did not match any variant of untagged enum {name}") from None

    return read


def untagged(name: str) -> WrapValidator:
    """An annotation of a union: if no member fits, serde says only that."""
    return WrapValidator(_in_untagged_enum(name))


def _integer_type(name: str, low: int, high: int) -> PlainValidator:
    in_schema = Annotated[int, Field(ge=low, le=high)]
    return PlainValidator(_integer(name, low, high), json_schema_input_type=in_schema)


U32 = Annotated[int, _integer_type("u32", 0, 2**32 - 1)]
U64 = Annotated[int, _integer_type("u64", 0, 2**64 - 1)]
Usize = Annotated[int, _integer_type("usize", 0, 2**64 - 1)]
I64 = Annotated[int, _integer_type("i64", -(2**63), 2**63 - 1)]
I32 = Annotated[int, _integer_type("i32", -(2**31), 2**31 - 1)]
F32 = Annotated[float, PlainValidator(read_f32, json_schema_input_type=float)]


def is_strict(info: ValidationInfo) -> bool:
    """Whether the body is read just as TGI reads it (`--strict-tgi`)."""
    return bool(info.context and info.context["is_strict"])


class WireModel(BaseModel):
    """Base of the request bodies: nothing is coerced, unknown keys are ignored, a known key comes once."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    extensions: ClassVar[frozenset[str]] = frozenset()
    """Fields that TGI does not know. If the body is read strictly, they are ignored like any unknown key."""
    is_null_absent: ClassVar[bool] = False
    """As OpenAI's clients mean it, null stands for the default, and of two names of a field the newer one counts.

    Not if the body is read strictly.
    """

    @model_validator(mode="before")
    @classmethod
    def _read_object(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        if is_strict(info) and cls.extensions:
            data = _without(data, cls.extensions)
        repeated = data.repeated if isinstance(data, RepeatedKeys) else frozenset()
        is_lenient = cls.is_null_absent and not is_strict(info)
        if is_lenient:
            data = {key: value for key, value in data.items() if value is not None}
        for name, spellings in spellings_of(cls):
            keys = [spelling for spelling in spellings if spelling in data]
            if not repeated.isdisjoint(spellings) or (len(keys) > 1 and not is_lenient):
                repeated_key = next((key for key in spellings if key in repeated), name)
                raise wrong(f"duplicate field `{repeated_key if is_lenient else name}`")
            for older in keys[:-1]:
                with reading(older):  # it does not count, but what it says is no nonsense
                    _field_reader(cls, name).validate_python(data.pop(older), context=info.context)
        return data


@functools.cache
def _field_reader(model: type[WireModel], name: str) -> TypeAdapter[Any]:
    """The reader of one field's value, which stands alone."""
    return TypeAdapter(model.model_fields[name].rebuild_annotation(), config=ConfigDict(strict=True))


def _without(data: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    kept = RepeatedKeys({key: value for key, value in data.items() if key not in names})
    if isinstance(data, RepeatedKeys):
        kept.repeated = data.repeated - names
    return kept


@functools.cache
def spellings_of(model: type[WireModel]) -> list[tuple[str, list[str]]]:
    """Each field's name and the keys it may have in the body."""
    spellings = []
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        keys = [str(key) for key in alias.choices] if isinstance(alias, AliasChoices) else [name]
        spellings.append((name, keys))
    return spellings


MISSING = "missing_required_parameter"
INVALID_TYPE = "invalid_type"


@dataclass(frozen=True, slots=True)
class WrongShape:
    """What is wrong with a value: in serde's words, and in OpenAI's."""

    reason: str
    location: str
    """Where the reason applies; empty: at the root."""
    param: str
    """The field that is wrong; of one that is missing, where it should stand. Empty: the root."""
    code: str

    @property
    def text(self) -> str:
        return f"{self.location}: {self.reason}" if self.location else self.reason


def describe(error: ValidationError) -> WrongShape:
    """The error that serde would have stopped at: wrong values come before missing fields."""
    details = error.errors(include_url=False)
    first = next((item for item in details if item["type"] != "missing"), details[0])
    reason, param, within = _reason(first), _path(first["loc"]), first.get("ctx", {})
    if "location" in within:
        location, param = _joined(param, within["location"]), _joined(param, within["param"])
        return WrongShape(reason, location, param, within["code"])
    if first["type"] == "missing":
        return WrongShape(reason, _path(first["loc"][:-1]), param, MISSING)
    return WrongShape(reason, param, param, INVALID_TYPE if reason.startswith("invalid type") else INVALID_VALUE)


def _path(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location if part != "").lstrip(".")


def _joined(path: str, below: str) -> str:
    return f"{path}.{below}" if path and below and not below.startswith("[") else path + below


def _reason(item: ErrorDetails) -> str:
    kind = item["type"]
    if kind == "serde":
        return str(item["ctx"]["reason"])
    if kind == "missing":
        return f"missing field `{item['loc'][-1]}`"
    if kind == "literal_error":
        variants = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        expected = ", ".join(f"`{variant}`" for variant in variants)
        value = item["input"]
        shown = unexpected(value) if isinstance(value, list | dict) else shortened(str(value))
        return f"unknown variant `{shown}`, expected one of {expected}"
    if kind == "model_type":
        return f"invalid type: {unexpected(item['input'])}, expected struct {item['ctx']['class_name']}"
    if kind in _EXPECTED:
        return f"invalid type: {unexpected(item['input'])}, expected {_EXPECTED[kind]}"
    return item["msg"]
