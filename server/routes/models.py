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


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]


@area.serve(
    Operation(
        method="GET",
        path="/v1/models",
        summary="The models: one",
        answers=(ModelList,),
        is_open=True,
        span="openai_get_model_info",
    )
)
async def models(request: Request) -> Response:
    return json_answer(ModelList(data=[_served(request)]))


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
    served = _served(request)
    if model_id != served.id:
        raise ModelNotFoundError(model_id)
    return json_answer(served)


def _served(request: Request) -> Model:
    service = service_of(request)
    model_id = service.config.model_id
    return Model(id=model_id, created=0 if service.config.is_strict_tgi else service.started_at, owned_by=model_id)
