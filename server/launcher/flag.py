"""The kinds of row in the table of flags: flags, variables, and the values that both hold. Standard library only."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.link.logs import parse_log_filter

MAX_INTEGER = 2**63 - 1
"""The limit of TGI's own parser; every library takes as much."""
MAX_DRAFT_TOKENS = 32
"""More would make steps longer than any draft is right."""


class Effect(enum.Enum):
    """The consequence of giving a flag."""

    SERVED = "has its effect"
    NONE = "accepted, without effect"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A kind of value."""

    name: str
    """Its name in messages and documents."""
    parse: Callable[[str], Any]
    """The function from a text to a value. Raises ValueError."""

    @property
    def metavar(self) -> str:
        return self.name.upper().replace(" ", "_")


def _integer(min_value: int, max_value: int = MAX_INTEGER) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not min_value <= value <= max_value:
            raise ValueError(text)
        return value

    return parse


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise ValueError(text)
    return value


def _duration(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise ValueError(text)
    return value


def _factor(text: str) -> float:
    value = _number(text)
    if value < 1:
        raise ValueError(text)
    return value


def _boolean(text: str) -> bool:
    values = {"1": True, "true": True, "0": False, "false": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _header_text(text: str) -> str:
    """Printable ASCII that a header can carry."""
    if not text.isascii() or not text.isprintable() or text != text.strip():
        raise ValueError(text)
    return text


def _secret(text: str) -> str:
    if not text:
        raise ValueError(text)
    return _header_text(text)


def _route(text: str) -> str:
    """A path with which a URL may go on after the port."""
    if not text.startswith("/") or any(mark in text for mark in "?#{} "):
        raise ValueError(text)
    return text


def _integers(text: str) -> tuple[int, ...]:
    return tuple(_integer(0)(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(name and name.isprintable() for name in names):
        raise ValueError(text)
    return names


def _log_filter(text: str) -> str:
    parse_log_filter(text)
    return text


def _first_integer(text: str) -> int:
    """The outermost level of OpenMP's list of threads per nesting level."""
    return _integer(1)(text.split(",")[0])


TEXT = Value(name="text", parse=str)
PATH = Value(name="path", parse=str)
COUNT = Value(name="count", parse=_integer(0))
DRAFT = Value(name="draft length", parse=_integer(0, MAX_DRAFT_TOKENS))
POSITIVE = Value(name="positive integer", parse=_integer(1))
PORT = Value(name="port", parse=_integer(0, 65535))
NUMBER = Value(name="number", parse=_number)
FRACTION = Value(name="fraction", parse=_fraction)
FACTOR = Value(name="factor", parse=_factor)
BOOLEAN = Value(name="boolean", parse=_boolean)
HEADER_TEXT = Value(name="header text", parse=_header_text)
ROUTE = Value(name="route", parse=_route)
SECRET = Value(name="key", parse=_secret)
INTEGERS = Value(name="list of integers", parse=_integers)
NAMES = Value(name="list of names", parse=_names)
THREADS = Value(name="thread count", parse=_first_integer)
LOG_FILTER = Value(name="log filter", parse=_log_filter)
SECONDS = Value(name="seconds", parse=_integer(0))
DURATION = Value(name="duration", parse=_duration)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The part that flags and variables have in common."""

    name: str
    help: str
    default: Any = None
    effect: Effect = Effect.SERVED
    harmless: tuple[Any, ...] = ()
    """Values that ask for what happens anyway. They pass in silence although the row is refused or does nothing."""
    fills: str = ""
    """Fields that get the value, separated by spaces: `engine.max_input_tokens` is one of EngineConfig, `server.` one
    of ServerConfig, `launcher.` one of LauncherArgs. `sharding`: `server.launcher.sharding` reads the value."""

    @property
    def attribute(self) -> str:
        return self.name.lower().replace("-", "_")

    def fields_of(self, part: str) -> list[str]:
        """Names of the fields of one configuration that get the value."""
        prefix = f"{part}."
        return [field.removeprefix(prefix) for field in self.fills.split() if field.startswith(prefix)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flag(Row):
    """`--name-like-this` and the environment variable `NAME_LIKE_THIS`; the flag wins."""

    value: Value = TEXT
    choices: tuple[str, ...] | None = None
    short: str | None = None
    is_switch: bool = False
    is_repeatable: bool = False
    is_secret: bool = False
    has_variable: bool = True
    reason: str = ""
    """The reason why there is no effect, or what to do instead of giving a refused flag."""
    refused_choices: tuple[str, ...] = ()
    """Choices of TGI that a served flag refuses."""
    stand_ins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Choices of TGI that are not there -> the one that is served in its place, with a warning. With --strict-tgi they
    are refused."""

    @property
    def served_choices(self) -> tuple[str, ...]:
        """The choices that have their effect."""
        return tuple(choice for choice in self.choices or () if choice not in self.refused_choices)

    @property
    def variable(self) -> str:
        return self.attribute.upper()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variable(Row):
    """An environment variable without a flag. Parsed by us if it has a kind of value, else read by a library."""

    value: Value | None = None

    @property
    def is_ours(self) -> bool:
        """Whether we, and no library, read the variable, and it has an effect."""
        return self.value is not None and self.effect is Effect.SERVED
