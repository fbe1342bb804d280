"""The row of a parameter: which values it may have, how others are refused, and how each dialect spells it.

Knows no parameter by name; `server.requests.sampling` has the rows.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from server.config import ServerConfig


class Dialect(enum.Enum):
    """A shape of request bodies; the value is the name of the wire model that has the parameters."""

    NATIVE = "GenerateParameters"
    CHAT = "ChatRequest"
    COMPLETIONS = "CompletionRequest"

    @property
    def prompt_key(self) -> str:
        """The key of what is prompted with."""
        return _PROMPT_KEYS[self]


_PROMPT_KEYS = {Dialect.NATIVE: "inputs", Dialect.CHAT: "messages", Dialect.COMPLETIONS: "prompt"}


@dataclass(frozen=True, slots=True)
class Spelling:
    """The keys of a parameter in one dialect; none stand for the parameter's own name."""

    is_tgi: bool
    """TGI reads it; if not, --strict-tgi ignores it like any unknown key."""
    keys: tuple[str, ...] = ()

    def named(self, *keys: str) -> Spelling:
        return Spelling(self.is_tgi, keys)


TGI = Spelling(is_tgi=True)
OURS = Spelling(is_tgi=False)

NATIVE_ONLY = {Dialect.NATIVE: TGI}
IN_ALL_OF_TGI = dict.fromkeys(Dialect, TGI)
IN_ALL_OF_OURS = dict.fromkeys(Dialect, OURS)
IN_OPENAI = {Dialect.CHAT: OURS, Dialect.COMPLETIONS: OURS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """An interval of allowed values."""

    above: int | None = None
    min: int | None = None
    below: int | None = None
    max: int | None = None
    max_setting: str | None = None
    """The field of ServerConfig that holds the maximum."""
    openai_max: int | None = None
    """OpenAI's dialects allow so much also where the setting is lower."""
    measured: Literal["value", "length", "members"] = "value"
    """The interval is for the value itself, for the length of a list, or for each value of a map."""

    def max_in(self, config: ServerConfig, dialect: Dialect) -> int | None:
        if self.max_setting is None:
            return self.max
        limit: int = getattr(config, self.max_setting)
        return limit if self.openai_max is None or dialect is Dialect.NATIVE else max(limit, self.openai_max)

    def measure(self, value: Any) -> list[float]:
        """The numbers of `value` that must lie within; None has none."""
        if value is None:
            return []
        if self.measured == "members":
            return list(value.values())
        return [len(value) if self.measured == "length" else value]

    def hold(self, number: float, config: ServerConfig, dialect: Dialect) -> bool:
        max_ = self.max_in(config, dialect)
        return (
            (self.above is None or number > self.above)
            and (self.min is None or number >= self.min)
            and (self.below is None or number < self.below)
            and (max_ is None or number <= max_)
        )

    def code(self, number: float) -> str:
        """OpenAI's `code` of a number that does not hold."""
        if self.measured == "length":
            return "array_above_max_length"
        low = self.min if self.above is None else self.above
        side = "below_min" if low is not None and number <= low else "above_max"
        return f"{'integer' if isinstance(number, int) else 'decimal'}_{side}_value"

    def schema(self, config: ServerConfig, dialect: Dialect) -> dict[str, int]:
        """JSON Schema's keywords; there are none for the values of a map."""
        if self.measured == "members":
            return {}
        limits = {
            "exclusiveMinimum": self.above,
            "minimum": self.min,
            "exclusiveMaximum": self.below,
            "maxItems" if self.measured == "length" else "maximum": self.max_in(config, dialect),
        }
        return {keyword: limit for keyword, limit in limits.items() if limit is not None}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A text for the client, and when it is due."""

    number: int
    """Place in TGI's order: the text's number in `docs/wire.md`, 2.2; a text of ours has that of the one it follows."""
    text: str
    """`{limit}` stands for the maximum, `{given}` for the number that was measured."""
    applies: Callable[[Any], bool] | None = None
    """Whether it is due for these Parameters; None: it is due if the value is out of bounds."""
    openai_text: str | None = None
    """The text in OpenAI's dialects, if their bounds are others."""


@dataclass(frozen=True, slots=True)
class Row:
    """Everything about one parameter that needs no text, no tokenizer and no engine."""

    type: Any
    """Type on the wire; null is allowed besides if it is the default."""
    spellings: Mapping[Dialect, Spelling]
    """Dialects that know the parameter."""
    default: Any = None
    openai_type: Any = None
    """Type in OpenAI's dialects, if that is another."""
    bounds: Bounds = Bounds()
    openai_bounds: Bounds | None = None
    """Bounds of OpenAI's dialects, if some values beside `bounds` switch the parameter off there."""
    refusal: Refusal | None = None
    engine_field: str | None = None
    """The field of SamplingParams that the value fills; None: it does not concern the sampler."""
    openai_engine_field: str | None = None
    """The field that it fills for OpenAI's dialects, if that is another."""
    is_for_drawing: bool = False
    """Has no effect where the likeliest token is taken."""
    is_filter: bool = False
    """Cuts the distribution that tokens are drawn from: if it is set, tokens are drawn."""

    def keys(self, name: str, dialect: Dialect) -> tuple[str, ...]:
        """The keys in `dialect` of the parameter called `name`, which has this row."""
        return self.spellings[dialect].keys or (name,)

    def type_in(self, dialect: Dialect) -> Any:
        type_ = self.type if dialect is Dialect.NATIVE else self.openai_type or self.type
        return type_ | None if self.default is None else type_

    def bounds_in(self, dialect: Dialect) -> Bounds:
        return self.bounds if dialect is Dialect.NATIVE or self.openai_bounds is None else self.openai_bounds

    def engine_field_for(self, *, is_openai: bool) -> str | None:
        return (self.openai_engine_field if is_openai else None) or self.engine_field


def parameter(row: Row) -> Any:
    """A field of a dataclass that has `row`."""
    return dataclasses.field(default=row.default, metadata={"row": row})


def rows_of(parameters: type[Any]) -> dict[str, Row]:
    """Name -> row, for a dataclass whose fields are made by `parameter`."""
    return {field.name: field.metadata["row"] for field in dataclasses.fields(parameters)}
