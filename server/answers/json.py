"""Writing JSON as TGI does (`docs/wire.md`, 0.3): compact, UTF-8, floats as the shortest single-precision decimal.

Shapes that several routes share stand here, and each route's own beside the route. msgspec encodes them: pydantic is
too slow for every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Protocol, TypeVar, cast

import msgspec
from fastapi import Response

from server.requests.serde import round_to_f32

VERSION = "3.3.6-dev0"
"""Version of the TGI whose wire this is. Clients branch on it."""
SYSTEM_FINGERPRINT = f"{VERSION}-native"

T = TypeVar("T")

encoder = msgspec.json.Encoder()


def f32(value: float) -> msgspec.Raw:
    """`value` as the shortest decimal that is the same single-precision number; NaN and infinities are null."""
    if not math.isfinite(value):
        return msgspec.Raw(b"null")
    exact = round_to_f32(value)
    # every single-precision number is determined by 9 digits, and 6 never say more than it holds
    for digits in range(6, 10):
        shortest = float(f"{exact:.{digits}g}")
        if round_to_f32(shortest) == exact:
            break
    return msgspec.Raw(repr(shortest).encode())


JsonF32 = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": ["number", "null"], "format": "float"})]
"""The type of `f32`'s results."""


class Token(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: JsonF32
    special: bool


class Scored(Protocol):
    """A token that the wire shows with its logprob."""

    @property
    def id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def logprob(self) -> float: ...
    @property
    def is_special(self) -> bool: ...


def token_answer(token: Scored) -> Token:
    return Token(token.id, token.text, f32(token.logprob), token.is_special)


def token_answers(tokens: Iterable[Scored]) -> list[Token]:
    return [token_answer(token) for token in tokens]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    """Tokens whose keys and values were there from another request."""


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int
    """Tokens of thoughts."""


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | msgspec.UnsetType = msgspec.UNSET
    """TGI has no such key."""
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET
    """Only where thoughts are told from answers."""


def encoded_items(items: Iterable[T]) -> list[T]:
    """`items` as the JSON of each, which takes their places: no call of the encoder holds the GIL for all of them."""
    return cast("list[T]", [msgspec.Raw(encoder.encode(item)) for item in items])


def json_answer(value: object, headers: dict[str, str] | None = None) -> Response:
    return encoded_answer(encoder.encode(value), headers)


def encoded_answer(content: bytes, headers: dict[str, str] | None = None) -> Response:
    """An answer of JSON that is encoded already."""
    return Response(content, headers=headers, media_type="application/json")
