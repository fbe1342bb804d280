"""A route's declaration: what it takes and answers, whether it needs the API key, what traces call it.

It stands beside the route's handler (`Area.serve`). The router, the description of the API, the guard and the spans all
read it; no other place lists routes.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import pydantic
from fastapi import APIRouter, Response
from starlette.routing import compile_path

Handler = TypeVar("Handler", bound=Callable[..., Coroutine[Any, Any, Response]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    """GET answers HEAD as well."""
    path: str
    """Parameters in braces, as Starlette writes them."""
    summary: str
    body: type[pydantic.BaseModel] | None = None
    answers: tuple[Any, ...] = ()
    """Types that a plain 200 may hold, as JSON. Without any the body is empty, or of the media type in `text`."""
    text: str | None = None
    """The media type of an answer that is not JSON."""
    events: tuple[type[msgspec.Struct], ...] = ()
    """Types of the data of an event, in a stream that goes well."""
    late_errors: tuple[type[msgspec.Struct], ...] = ()
    """Types of the data of the event that ends a stream which fails, without --strict-tgi."""
    is_generating: bool = False
    """Runs the model: may be refused as overloaded and may fail."""
    has_headers: bool = False
    """Says sizes and times in x- headers."""
    status: int = 200
    errors: tuple[int, ...] = ()
    """Further statuses with an error object."""
    is_open: bool = False
    """Answers without the API key."""
    is_open_to_tgi: bool = False
    """Answers without the API key under --strict-tgi."""
    span: str | None = None
    """TGI's name of the handler, in log lines and traces."""

    def is_protected(self, *, is_strict: bool) -> bool:
        """Whether it answers only with the API key, under --strict-tgi or without."""
        return not (self.is_open or (self.is_open_to_tgi and is_strict))


class Area(APIRouter):
    """A router whose routes carry their operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def serve(self, *operations: Operation) -> Callable[[Handler], Handler]:
        """A decorator: the handler answers each of `operations`."""

        def register(handler: Handler) -> Handler:
            for operation in operations:
                methods = ["GET", "HEAD"] if operation.method == "GET" else [operation.method]
                self.add_api_route(operation.path, handler, methods=methods)
            self.operations += operations
            return handler

        return register


def operations_of(areas: Iterable[Area]) -> tuple[Operation, ...]:
    return tuple(operation for area in areas for operation in area.operations)


class OperationFinder:
    """Finds the operation that a request asks for, before the router has matched it."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._by_path: dict[str, dict[str, Operation]] = {}
        for operation in operations:
            self._by_path.setdefault(operation.path, {})[operation.method] = operation
        self._patterns = [
            (compile_path(path)[0], methods) for path, methods in self._by_path.items() if path_parameters(path)
        ]

    def find(self, path: str, method: str) -> Operation | None:
        """The operation, or None if there is no such path.

        A method that the path lacks counts as its GET, or else as its only one: the router refuses it later with 405.
        """
        methods = self._by_path.get(path)
        if methods is None:
            methods = next((methods for pattern, methods in self._patterns if pattern.match(path)), None)
        if methods is None:
            return None
        return methods.get(method) or methods.get("GET") or next(iter(methods.values()))


def path_parameters(path: str) -> list[str]:
    """Names of the parameters of a path with braces."""
    return list(compile_path(path)[2])


def described_path(path: str) -> str:
    """The path as a description writes it: `/v1/models/{model_id:model_id}` is `/v1/models/{model_id}`."""
    return compile_path(path)[1]
