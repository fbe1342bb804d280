"""GET /v1/models and, ours, /v1/models/{id} (reference 1.5)."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from server.answers import json_answer
from server.generation import service_of

router = APIRouter()


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]


@router.api_route("/v1/models", methods=["GET", "HEAD"])
async def models(request: Request) -> Response:
    model_id = service_of(request).config.model_id
    return json_answer(ModelList(data=[Model(id=model_id, owned_by=model_id)]))
