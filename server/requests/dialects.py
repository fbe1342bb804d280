"""Between the rows of the parameters and the wire models: fields, values and limits, dialect by dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import create_model

from server.config import ServerConfig
from server.requests.rows import Bounds, Dialect, Row
from server.requests.sampling import ROWS, Parameters
from server.requests.serde import WireModel
from server.requests.values import Grammar

MAX_CHOICES = 128
"""OpenAI's limit of `n`."""

Model = TypeVar("Model", bound=WireModel)


def rows_in(dialect: Dialect) -> list[tuple[str, tuple[str, ...], Row]]:
    """Name, keys and row of each parameter that `dialect` knows."""
    return [(name, row.keys(name, dialect), row) for name, row in ROWS.items() if dialect in row.spellings]


def speaking(dialect: Dialect) -> Callable[[type[Model]], type[Model]]:
    """A decorator of the wire model of `dialect`: rows that it does not declare become its last fields.

    A declared one has its place among the fields, and may be read in a way of its own.
    """

    def complete(model: type[Model]) -> type[Model]:
        fields: dict[str, Any] = {
            key: (row.type_in(dialect), row.default)
            for _, (key, *_), row in rows_in(dialect)
            if key not in model.model_fields
        }
        if fields:
            model = create_model(
                model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **fields
            )
        model.extensions |= {key for _, (key, *_), row in rows_in(dialect) if not row.spellings[dialect].is_tgi}
        return model

    return complete


def parameters_of(dialect: Dialect, body: WireModel) -> Parameters:
    """The parameters in a body of `dialect`; null is the default."""
    values: dict[str, Any] = {}
    for name, (key, *_), _ in rows_in(dialect):
        value = getattr(body, key)
        if value is not None:
            values[name] = value.spec() if isinstance(value, Grammar) else value
    return Parameters(**values)


def limits_of(dialect: Dialect, config: ServerConfig) -> dict[str, dict[str, int]]:
    """Key -> keywords of JSON Schema for its value."""
    limits = {key: row.bounds_in(dialect).schema(config, dialect) for _, keys, row in rows_in(dialect) for key in keys}
    if dialect is not Dialect.NATIVE:
        limits["n"] = Bounds(min=1, max=MAX_CHOICES).schema(config, dialect)
    return limits
