"""Values in the settings of quantized checkpoints, as every format's reader checks them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from quant.base import FormatError

MAX_QUOTED_CHARS = 100
"""Characters of a wrong value that an error shows."""


def read_integer(settings: Mapping[str, Any], key: str, is_allowed: Callable[[int], bool]) -> int:
    """The value at `key`. Raises FormatError where it is missing or not allowed."""
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not is_allowed(value):
        raise FormatError(
            f"the quantisation's {key} is {_shortened(value)}, which can't be loaded: fetch the model again"
        )
    return value


def read_map(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The map at `key`, an empty one where there is nothing. Raises FormatError for anything else."""
    value = settings.get(key) or {}
    if not isinstance(value, Mapping):
        raise FormatError(f"the quantisation's {key} is {_shortened(value)}, not a map: fetch the model again")
    return value


def read_maps(settings: Mapping[str, Any], key: str) -> Mapping[str, Mapping[str, Any]]:
    """The map of maps at `key`, an empty one where there is nothing. Raises FormatError for anything else."""
    maps = read_map(settings, key)
    return {name: read_map(maps, name) for name in maps}


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression that names modules. Raises FormatError where it is none."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(
            f"the quantisation's pattern {_shortened(pattern)} is no regular expression ({error}): fetch the model "
            "again"
        ) from error


def unusable(reason: str) -> FormatError:
    """The error of settings that can't be used as a whole."""
    return FormatError(f"the quantisation's settings can't be used ({reason}): fetch the model again")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."


def read_group_size(settings: Mapping[str, Any]) -> int:
    """The inputs that share a scale, -1: all of them. Raises FormatError."""
    return read_integer(settings, "group_size", lambda value: value == -1 or value > 0)


def read_block(settings: Mapping[str, Any], key: str) -> tuple[int, int]:
    """The outputs and inputs that share a scale. Raises FormatError."""
    value = settings.get(key)
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if not is_pair or not all(isinstance(size, int) and size > 0 for size in value):  # type: ignore[union-attr]
        raise FormatError(
            f"the quantisation's {key} is {_shortened(value)}, which can't be loaded: fetch the model again"
        )
    return value[0], value[1]  # type: ignore[index]


def describe(name: str, bits: int, group_size: int) -> str:
    """A format as the start-up summary names it."""
    groups = "one group" if group_size == -1 else f"groups of {group_size}"
    return f"{name}, {bits} bits, {groups}"
