"""The structure of a JSON text, counted before anything is read: what is too large is refused for next to nothing.

Counts are of all bytes outside of strings, so they also hold for a text that turns out to be no JSON.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from server.errors import BodyError

CHUNK_BYTES = 1 << 16
"""The text is counted in pieces: no call into C holds the GIL for longer than a millisecond."""

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DIGITS = bytes(ord("0") if byte in b"0123456789" else 0 for byte in range(256))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


@dataclass(frozen=True, kw_only=True, slots=True)
class StructureLimits:
    """What a body may hold. A request of 10,000 messages, or of four prompts of 131,072 token ids, is within."""

    max_values: int = 600_000
    max_keys: int = 150_000
    """Keys of all objects together."""
    max_containers: int = 50_000
    """Lists and objects."""
    max_digits: int = 1_000
    """Digits of one number."""


DEFAULT_LIMITS = StructureLimits()


@dataclass(frozen=True, slots=True)
class Structure:
    """What was counted."""

    depth: int
    num_containers: int


def check_structure(text: bytes, limits: StructureLimits) -> Structure:
    """The structure of `text`. Raises BodyError when there is too much of anything."""
    num_values = num_keys = num_containers = depth = max_depth = 0
    long_number = b"0" * (limits.max_digits + 1)
    last_digits = b""
    for outside in _outside_strings(text):
        num_keys += outside.count(b":")
        brackets = outside.translate(None, _NOT_BRACKETS)
        num_opened = brackets.count(b"[") + brackets.count(b"{")
        num_containers += num_opened
        num_values += outside.count(b",") + num_opened
        _refuse_more("values", num_values, limits.max_values)
        _refuse_more("keys", num_keys, limits.max_keys)
        _refuse_more("lists and objects", num_containers, limits.max_containers)
        digits = last_digits + outside.translate(_DIGITS)
        if long_number in digits:
            raise BodyError(422, f"The request body has a number of more than {limits.max_digits} digits")
        last_digits = digits[-limits.max_digits :]
        if brackets:
            depths = list(itertools.accumulate(map(_STEPS.__getitem__, brackets), initial=depth))
            depth, max_depth = depths[-1], max(max_depth, *depths)
    return Structure(max_depth, num_containers)


def _refuse_more(name: str, number: int, limit: int) -> None:
    if number > limit:
        raise BodyError(422, f"The request body has more than {limit} {name}")


def _outside_strings(text: bytes) -> Iterator[bytes]:
    """The bytes between the strings, a chunk at a time; a string is a quote at its end."""
    is_inside = False
    start = 0
    while start < len(text):
        chunk = text[start : start + CHUNK_BYTES]
        if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:  # the last escape goes on in the next chunk
            chunk = text[start : start + CHUNK_BYTES + 1]
        start += len(chunk)
        parts = chunk.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield b'"'.join(parts[is_inside::2])
        is_inside ^= len(parts) % 2 == 0
