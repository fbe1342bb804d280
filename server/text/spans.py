"""The tokens of a text with their places in it, as JSON (`docs/wire.md`, 1.3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec
import tokenizers

PIECE_TOKENS = 1_000
"""Tokens that are encoded at a time: there may be a million, which are not to be objects all at once."""


class SimpleToken(msgspec.Struct, frozen=True):
    """A token and the bytes of the UTF-8 text that it stands for; an added one has none: 0, 0."""

    id: int
    text: str
    start: int
    stop: int


def spans_json(text: str, encoding: tokenizers.Encoding) -> bytes:
    """A list of SimpleToken."""
    spans = _spans(text, encoding)
    written = bytearray(b"[")
    while piece := list(itertools.islice(spans, PIECE_TOKENS)):
        if len(written) > 1:
            written += b","
        written += msgspec.json.encode(piece)[1:-1]
    return bytes(written + b"]")


def _spans(text: str, encoding: tokenizers.Encoding) -> Iterator[SimpleToken]:
    num_bytes = [len(character.encode()) for character in text]
    places = list(itertools.accumulate(num_bytes, initial=0))  # by code point: the library counts those
    # A token that is a part of a character has the span of the whole character: the library says so, to TGI too.
    for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        yield SimpleToken(token_id, text[start:stop], places[start], places[stop])
