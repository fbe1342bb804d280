"""The chat that a body of another shape becomes, and the refusal of what no chat has (`docs/other-apis.md`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from server.errors import ValidationError
from server.requests import serde
from server.requests.openai import ChatRequest

Json = dict[str, Any]


def _member_of(value: object) -> str:
    return "text" if isinstance(value, str) else ""


TextOrItems = Annotated[
    Annotated[str, pydantic.Tag("text")] | Annotated[serde.ListOf[Json], pydantic.Tag("")],
    pydantic.Discriminator(_member_of),
]
"""An error of one of the items is told of that item; the empty tag is no part of its path."""


def chat_request(body: Json, places: Mapping[str, str]) -> ChatRequest:
    """A chat that another route's body has become. Raises ValidationError.

    `places`: a place in the chat -> the place in that body which has become it, with all that is below.
    """
    try:
        return ChatRequest.model_validate(body, context={"is_strict": False})
    except pydantic.ValidationError as error:
        wrong = serde.describe(error)
    param, wrong = _sent(wrong.param, places), dataclasses.replace(wrong, location=_sent(wrong.location, places))
    raise ValidationError(wrong.text, logged="the body is no chat", param=param or None, code=wrong.code)


def _sent(path: str, places: Mapping[str, str]) -> str:
    """The place in the client's body of a place in the chat."""
    above = max((place for place in places if path.startswith(place)), key=len, default="")
    return places.get(above, "") + path.removeprefix(above)


def unsupported(things: str, kind: Any) -> ValidationError:
    """The refusal of a type that a client has named."""
    shown = serde.shortened(kind) if isinstance(kind, str) else "unknown"
    return ValidationError(f"{things} of type `{shown}` are not supported", logged=f"{things} of an unsupported type")
