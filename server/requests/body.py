"""From the bytes of a body to a wire model, or to a plain-text refusal of TGI's web framework (`docs/wire.md`, 0.2)."""

from __future__ import annotations

import asyncio
import codecs
import collections
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message as MediaType
from typing import Any, TypeVar

import pydantic

from server.errors import BodyError
from server.requests import serde
from server.requests.serde import RepeatedKeys
from server.requests.structure import DEFAULT_LIMITS, Structure, check_structure

WHITESPACE = " \t\n\r"
MAX_DEPTH = 128
"""serde_json's recursion limit."""
MAX_INLINE_BYTES = 1 << 14
"""A body of so many bytes is read by the event loop itself, in a few milliseconds at most."""
NUM_READERS = 1
"""A second thread would read no faster, and make the event loop wait longer for its turn."""
CONTAINER_BYTES = 800
"""Memory of a list or an object, as the model that it becomes."""
_LEADS_OF_WIDE = (b"\xf0", b"\xf1", b"\xf2", b"\xf3", b"\xf4")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

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
T = TypeVar("T")


class _NumberError(ValueError):
    """A number is none of JSON's. The text is serde's."""


@dataclass(frozen=True, slots=True)
class MeasuredBody:
    """The bytes of a body, and how much is in them."""

    data: bytes
    structure: Structure

    @property
    def memory(self) -> int:
        """Bytes of memory that the body may take once it is read: a text is as wide as its widest character."""
        if b"\\u" in self.data or any(lead in self.data for lead in _LEADS_OF_WIDE):
            width = 4
        else:
            width = 1 if self.data.isascii() else 2
        return width * len(self.data) + CONTAINER_BYTES * self.structure.num_containers


class BodyReader:
    """Reads bodies. Large ones are read on threads of its own, so that they don't hold up streams."""

    def __init__(self, *, is_strict: bool) -> None:
        self._context = {"is_strict": is_strict}
        self._executor = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="bodies")

    async def measure(self, data: bytes) -> MeasuredBody:
        """The body `data`. Raises BodyError if there is too much in it, whatever that is."""
        return await self._run(len(data), self._measure, data)

    async def read(self, body: MeasuredBody, model: type[M]) -> M:
        """The body as `model`. Raises BodyError."""
        return await self._run(len(body.data), self._read, body, model)

    async def read_into(self, body: MeasuredBody, model: type[M], convert: Callable[[M], T]) -> T:
        """The result of `convert` for the body as `model`. Raises BodyError, and what `convert` raises."""
        return await self._run(len(body.data), lambda: convert(self._read(body, model)))

    async def _run(self, num_bytes: int, work: Callable[..., T], *args: Any) -> T:
        if num_bytes <= MAX_INLINE_BYTES:
            return work(*args)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *args)

    def _measure(self, data: bytes) -> MeasuredBody:
        return MeasuredBody(data, check_structure(data, DEFAULT_LIMITS))

    def _read(self, body: MeasuredBody, model: type[M]) -> M:
        data = body.data if self._context["is_strict"] else body.data.removeprefix(codecs.BOM_UTF8)
        text, may_have_surrogates = _decoded(data)
        value, end = _parse(text, is_checked=body.structure.depth <= MAX_DEPTH and not may_have_surrogates)
        try:
            return model.model_validate(value, context=self._context)
        except pydantic.ValidationError as error:
            wrong = serde.describe(error)
        reason = f"{wrong.text} at {_position(text, end)}"
        raise BodyError(
            422,
            f"Failed to deserialize the JSON body into the target type: {reason}",
            param=wrong.param or None,
            code=wrong.code,
        )

    def close(self) -> None:
        self._executor.shutdown(wait=False)


def require_json(content_type: str) -> None:
    """Raises BodyError."""
    media_type = MediaType()
    media_type["content-type"] = content_type
    subtype = media_type.get_content_subtype()
    if media_type.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise BodyError(415, "Expected request with `Content-Type: application/json`")


def _decoded(body: bytes) -> tuple[str, bool]:
    """The text, and whether it may hold surrogates, which Rust's strings cannot."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return body.decode(errors="surrogateescape"), True
    return text, _ESCAPED_SURROGATE.search(text) is not None


def _parse(text: str, *, is_checked: bool = False) -> tuple[Any, int]:
    """The first JSON value in `text` and its end. What follows is not read.

    `is_checked`: there are no surrogates and no deep nesting in `text`.
    """
    start = len(text) - len(text.lstrip(WHITESPACE))
    try:
        value, end = _decoder.raw_decode(text, start)
        if not is_checked:
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
    """The number. One of more than 20 digits is a float, as in serde, and Python's limit on digits is never met."""
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
