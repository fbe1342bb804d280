"""GET /v1/models (`docs/wire.md`, 1.5), and /v1/models/{id}, which TGI does not have."""

from __future__ import annotations

import msgspec
from fastapi import Request, Response
from starlette.convertors import PathConvertor, register_url_convertor

from server.answers.json import json_answer
from server.errors import ModelNotFoundError
from server.operation import Area, Operation
from server.service import service_of

area = Area()


class _ModelIdConvertor(PathConvertor):
    """Any text, also with slashes and, unlike Starlette's `path`, line breaks: every unknown id gets OpenAI's error."""

    regex = r"[\s\S]*"


register_url_convertor("model_id", _ModelIdConvertor())


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str
    max_model_len: int | msgspec.UnsetType = msgspec.UNSET
    """Tokens of a prompt and its answer together. TGI has no such key."""
    parent: str | msgspec.UnsetType = msgspec.UNSET
    """The model that an adapter changes."""


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]


@area.serve(
    Operation(
        method="GET",
        path="/v1/models",
        summary="The names of the model",
        answers=(ModelList,),
        is_open=True,
        span="openai_get_model_info",
    )
)
async def models(request: Request) -> Response:
    return json_answer(ModelList(data=[_served(request, name) for name in _names(request)]))


@area.serve(
    Operation(
        method="GET",
        path="/v1/models/{model_id:model_id}",
        summary="One model",
        answers=(Model,),
        errors=(404,),
        is_open=True,
    )
)
async def model(request: Request, model_id: str) -> Response:
    names = _names(request)
    if model_id not in names:
        raise ModelNotFoundError(model_id, names)
    return json_answer(_served(request, model_id))


def _names(request: Request) -> list[str]:
    """The names of the model and, which TGI does not list, of the adapters."""
    service = service_of(request)
    adapters = () if service.config.is_strict_tgi else service.validator.adapters
    return [*service.config.model_names, *adapters]


def _served(request: Request, name: str) -> Model:
    service = service_of(request)
    owner = service.config.model_id
    if service.config.is_strict_tgi:
        return Model(id=name, created=0, owned_by=owner)
    limit = service.engine.limits.max_total_tokens
    parent = service.config.model_names[0] if name in service.validator.adapters else msgspec.UNSET
    return Model(id=name, created=service.started_at, owned_by=owner, max_model_len=limit, parent=parent)
