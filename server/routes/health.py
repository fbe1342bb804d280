"""The state of the server: the probes (`docs/wire.md`, 1.6) and /metrics."""

from __future__ import annotations

from fastapi import Request, Response

from server.errors import UnhealthyError
from server.operation import Area, Operation
from server.service import service_of

area = Area()

METRICS_TYPE = "text/plain; charset=utf-8"


def _probe(path: str, *, span: str | None = None) -> Operation:
    return Operation(
        method="GET", path=path, summary="Whether the server can answer", errors=(503,), is_open=True, span=span
    )


@area.serve(
    _probe("/", span="health"),
    _probe("/health", span="health"),
    _probe("/ping", span="health"),
    _probe("/readyz"),
)
async def health(request: Request) -> Response:
    if not service_of(request).engine.is_healthy:
        raise UnhealthyError
    return Response()


@area.serve(
    Operation(method="GET", path="/livez", summary="Whether the engine lives", errors=(503,), is_open=True),
)
async def livez(request: Request) -> Response:
    """Ours, as Kubernetes names it, beside /readyz: a slow engine is not ready, only a dead one calls for a restart."""
    if service_of(request).engine.dead.is_set():
        raise UnhealthyError
    return Response()


@area.serve(
    Operation(method="GET", path="/metrics", summary="Metrics for Prometheus", text=METRICS_TYPE, is_open=True),
)
async def metrics(request: Request) -> Response:
    service = service_of(request)
    text = service.metrics.render(service.engine.stats)
    return Response(text, headers={"content-type": METRICS_TYPE})
