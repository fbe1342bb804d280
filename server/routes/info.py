"""GET /info: the model and the limits (`docs/wire.md`, 1.4)."""

from __future__ import annotations

import msgspec
from fastapi import Request, Response

from server.answers.json import VERSION, json_answer
from server.operation import Area, Operation
from server.service import service_of

area = Area()


class Info(msgspec.Struct, frozen=True, kw_only=True):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None = None
    """Always null: nobody asks the Hub for it."""
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str = "text-generation-router"
    version: str = VERSION
    sha: str | None
    docker_label: str | None
    """Both null but in a container image."""


@area.serve(
    Operation(
        method="GET",
        path="/info",
        summary="The model and the limits",
        answers=(Info,),
        is_open=True,
        span="get_model_info",
    )
)
async def info(request: Request) -> Response:
    service = service_of(request)
    config, limits = service.config, service.engine.limits
    return json_answer(
        Info(
            model_id=config.model_id,
            model_sha=config.model_sha,
            max_concurrent_requests=config.max_concurrent_requests,
            max_best_of=config.max_best_of,
            max_stop_sequences=config.max_stop_sequences,
            max_input_tokens=limits.max_input_tokens,
            max_total_tokens=limits.max_total_tokens,
            validation_workers=config.validation_workers,
            max_client_batch_size=config.max_prompts,
            sha=config.build_sha,
            docker_label=config.docker_label,
        )
    )
