"""The application: areas of routes, error handlers, and the state that they share."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sse_starlette.sse import AppStatus

from server.client import EngineClient
from server.config import ServerConfig
from server.edge.access import ApiKeyGuard, CorsHeaders
from server.edge.browser_home import BrowserHome
from server.edge.further_paths import FurtherPaths
from server.edge.intake import IntakeRelease
from server.error_handlers import install_error_handlers
from server.openapi import build_openapi
from server.operation import Area, OperationFinder, operations_of
from server.routes import (
    adapters,
    anthropic,
    chat,
    cloud,
    completions,
    dashboard,
    docs,
    generate,
    health,
    info,
    models,
    responses,
    tokenize,
    ui,
)
from server.service import GenerationService
from server.telemetry.request_ids import RequestIds
from server.telemetry.spans import SpansMiddleware, Tracer
from server.text.tokenizer import TextTokenizer

AREAS = (
    generate.area,
    chat.area,
    completions.area,
    responses.area,
    anthropic.area,
    cloud.area,
    tokenize.area,
    info.area,
    models.area,
    health.area,
    docs.area,
    ui.area,
    dashboard.area,
)
"""Every route of the server that needs no flag, in the order of the description."""
AREAS_BESIDE_TGI = (responses.area, anthropic.area)
"""Areas that are not there under --strict-tgi, whose tools have a form of their own."""
PAGES = (ui.area, dashboard.area)
"""Areas of the pages for browsers."""


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    # On SIGTERM running streams go on to their end; uvicorn waits for them, up to its own timeout.
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
    yield
    service: GenerationService = app.state.service
    service.close()
    if app.state.tracer is not None:
        await run_in_threadpool(app.state.tracer.close)


def create_app(engine: EngineClient, config: ServerConfig, tokenizer: TextTokenizer) -> FastAPI:
    app = FastAPI(lifespan=_lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = GenerationService(engine, config, tokenizer)
    app.state.figures = dashboard.broadcast_figures(app.state.service)
    areas = areas_of(config)
    operations = operations_of(areas)
    app.state.openapi = build_openapi(operations, config)
    install_error_handlers(app)
    for area in areas:
        app.include_router(area)
    finder = OperationFinder(operations)
    if config.api_key is not None:
        app.add_middleware(ApiKeyGuard, api_key=config.api_key, finder=finder, is_strict=config.is_strict_tgi)
    # These headers are outside of the guard: preflights need no key, and its refusals get them as well.
    app.add_middleware(CorsHeaders, origins=config.cors_allow_origin, is_strict=config.is_strict_tgi)
    app.add_middleware(IntakeRelease, intake=app.state.service.intake)
    if not config.is_strict_tgi:
        app.add_middleware(RequestIds)
    app.state.tracer = _tracer(config)
    app.add_middleware(SpansMiddleware, tracer=app.state.tracer, finder=finder, is_strict=config.is_strict_tgi)
    further = (("POST", config.predict_route, "/vertex"), ("GET", config.health_route, "/health"))
    routes = {(method, path): route for method, path, route in further if path is not None}
    app.add_middleware(FurtherPaths, finder=finder, routes=routes)
    if config.has_pages:
        app.add_middleware(BrowserHome, page=ui.PLAYGROUND_PATH)
    return app


def areas_of(config: ServerConfig) -> list[Area]:
    """The areas that a server of this configuration has."""
    absent = [*(AREAS_BESIDE_TGI if config.is_strict_tgi else ()), *(() if config.has_pages else PAGES)]
    areas = [area for area in AREAS if area not in absent]
    return [*areas, adapters.area] if config.is_lora_updating else areas


def _tracer(config: ServerConfig) -> Tracer | None:
    if config.otlp_endpoint is None:
        return None
    from server.telemetry.otlp import OtlpTracer  # 15 MB that a server without traces does not need

    return OtlpTracer(config.otlp_endpoint, config.otlp_service_name)
