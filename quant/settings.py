"""Values in the settings of quantized checkpoints, as every format's reader checks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quant.base import FormatError


def read_integer(settings: Mapping[str, Any], key: str, is_allowed: Callable[[int], bool]) -> int:
    """The value at `key`. Raises FormatError where it is missing or not allowed."""
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not is_allowed(value):
        raise FormatError(f"the quantisation's {key} is {value!r}, which can't be loaded: fetch the model again")
    return value


def read_group_size(settings: Mapping[str, Any]) -> int:
    """The inputs that share a scale, -1: all of them. Raises FormatError."""
    return read_integer(settings, "group_size", lambda value: value == -1 or value > 0)


def describe(name: str, bits: int, group_size: int) -> str:
    """A format as the start-up summary names it."""
    groups = "one group" if group_size == -1 else f"groups of {group_size}"
    return f"{name}, {bits} bits, {groups}"
