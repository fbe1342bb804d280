"""From the bytes of a body to a wire model, or to a plain-text refusal of TGI's web framework (`docs/wire.md`, 0.2)."""

from __future__ import annotations

import collections
import json
import math
from email.message import Message as MediaType
from typing import Any, TypeVar

import pydantic
from fastapi import Request

from server.config import ServerConfig
from server.errors import BodyError
from server.requests import serde
from server.requests.serde import RepeatedKeys

WHITESPACE = " \t\n\r"
MAX_LENGTH_DIGITS = 20
"""Digits of a length that is a number at all; Python would refuse to read more than 4,300."""
MAX_DEPTH = 128
"""serde_json's recursion limit."""

# start of a message of json -> (serde's words, serde's words if the text ends there)
_REASONS = {
    "Expecting value": ("expected value", "EOF while parsing a value"),
    "Expecting property name": ("key must be a string", "EOF while parsing an object"),
    "Expecting ':'": ("expected `:`", "EOF while parsing an object"),
    "Expecting ','": ("expected `,` or `}`", "EOF while parsing an object"),
    "Unterminated string": ("EOF while parsing a string", "EOF while parsing a string"),
    "Invalid control": ("control character (\\u0000-\\u001F) found while parsing a string",) * 2,
    "Illegal trailing comma": ("trailing comma", "trailing comma"),  # Python 3.13's own case
    "Invalid \\": ("invalid escape", "EOF while parsing a string"),
}

M = TypeVar("M", bound=pydantic.BaseModel)


class _NumberError(ValueError):
    """A number is none of JSON's. The text is serde's."""


async def read_body(request: Request, model: type[M], config: ServerConfig) -> M:
    """The body as `model`. Raises BodyError."""
    _require_json(request.headers.get("content-type", ""))
    text = (await _receive(request, config.payload_limit)).decode(errors="surrogateescape")
    value, end = _parse(text)
    try:
        return model.model_validate(value, context={"is_strict": config.is_strict_tgi})
    except pydantic.ValidationError as error:
        reason = serde.describe(error)
    raise BodyError(
        422, f"Failed to deserialize the JSON body into the target type: {reason} at {_position(text, end)}"
    )


def _require_json(content_type: str) -> None:
    media_type = MediaType()
    media_type["content-type"] = content_type
    subtype = media_type.get_content_subtype()
    if media_type.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise BodyError(415, "Expected request with `Content-Type: application/json`")


async def _receive(request: Request, limit: int) -> bytes:
    """The whole body. It is refused as soon as it is known to be too long, whatever its headers say."""
    announced = request.headers.get("content-length", "")
    body = bytearray()
    is_number = announced.isdecimal() and announced.isascii()
    is_too_long = is_number and (len(announced) > MAX_LENGTH_DIGITS or int(announced) > limit)
    if not is_too_long:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                is_too_long = True
                break
    if is_too_long:
        raise BodyError(413, "Failed to buffer the request body: length limit exceeded")
    return bytes(body)


def _parse(text: str) -> tuple[Any, int]:
    """The first JSON value in `text` and its end. What follows is not read."""
    start = len(text) - len(text.lstrip(WHITESPACE))
    try:
        value, end = _decoder.raw_decode(text, start)
        _check(value, MAX_DEPTH)
    except json.JSONDecodeError as error:
        raise _not_json(text, error.pos, _reason(error)) from None
    except _NumberError as error:
        raise _not_json(text, start, str(error)) from None
    except RecursionError:
        raise _not_json(text, start, "recursion limit exceeded") from None
    except UnicodeEncodeError:
        raise _not_json(text, start, "invalid unicode code point") from None
    return value, end


def _check(value: Any, depth: int) -> None:
    """Refuse what Rust's strings and serde's stack cannot hold: lone surrogates, deep nesting."""
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
    elif isinstance(value, list | dict):
        if depth == 0:
            raise RecursionError
        for item in value:
            _check(item, depth - 1)
        if isinstance(value, dict):
            _check(list(value.values()), depth)


def _reason(error: json.JSONDecodeError) -> str:
    is_at_end = error.pos >= len(error.doc)
    return next(words[is_at_end] for start, words in _REASONS.items() if error.msg.startswith(start))


def _not_json(text: str, position: int, reason: str) -> BodyError:
    return BodyError(400, f"Failed to parse the request body as JSON: {reason} at {_position(text, position)}")


def _position(text: str, position: int) -> str:
    line_start = text.rfind("\n", 0, position) + 1
    return f"line {text.count(chr(10), 0, position) + 1} column {position - line_start}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    counts = collections.Counter(key for key, _ in pairs)
    marked = RepeatedKeys(plain)
    marked.repeated = frozenset(key for key, count in counts.items() if count > 1)
    return marked


def _integer(digits: str) -> int | float:
    """The number. Beyond 64 bits serde reads a float; so do we, and Python's limit on digits is never met."""
    return int(digits) if len(digits) <= 20 else _float(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _NumberError("number out of range")
    return value


def _refuse_constant(name: str) -> None:
    raise _NumberError("expected value")


_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_refuse_constant
)
