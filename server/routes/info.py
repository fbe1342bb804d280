"""What the server is and how it does: /info, /metrics and the probes (reference 1.4, 1.6, 6.6, 7.1)."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from server.answers.json import VERSION, json_answer
from server.errors import UnhealthyError
from server.generation import service_of

router = APIRouter()


class Info(msgspec.Struct, frozen=True, kw_only=True):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None = None
    """Never known: the Hub is not asked."""
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str = "text-generation-router"
    version: str = VERSION
    sha: str | None = None
    docker_label: str | None = None


@router.api_route("/info", methods=["GET", "HEAD"])
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
            max_client_batch_size=config.max_client_batch_size,
        )
    )


@router.api_route("/readyz", methods=["GET", "HEAD"])
@router.api_route("/", methods=["GET", "HEAD"])
@router.api_route("/ping", methods=["GET", "HEAD"])
@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    if not service_of(request).engine.is_healthy:
        raise UnhealthyError
    return Response()


@router.api_route("/livez", methods=["GET", "HEAD"])
async def livez(request: Request) -> Response:
    """Ours, as Kubernetes names it, beside /readyz: a slow engine is not ready, only a dead one calls for a restart."""
    if service_of(request).engine.dead.is_set():
        raise UnhealthyError
    return Response()


@router.api_route("/metrics", methods=["GET", "HEAD"])
async def metrics(request: Request) -> Response:
    service = service_of(request)
    text = service.metrics.render(service.engine.stats)
    return Response(text, headers={"content-type": "text/plain; charset=utf-8"})
