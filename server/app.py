"""The application: routers, error handlers, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from server.access import ApiKeyGuard, CorsHeaders
from server.client import EngineClient
from server.config import ServerConfig
from server.errors import install_error_handlers
from server.generation import GenerationService
from server.openapi import build_openapi
from server.routes import chat, cloud, completions, docs, generate, info, models, tokenize
from server.tokenizer import TextTokenizer


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    # On SIGTERM running streams go on to their end; uvicorn waits for them, up to its own timeout.
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
    yield
    service: GenerationService = app.state.service
    service.tokenizer.close()


def create_app(engine: EngineClient, config: ServerConfig, tokenizer: TextTokenizer) -> FastAPI:
    app = FastAPI(lifespan=_lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = GenerationService(engine, config, tokenizer)
    app.state.openapi = build_openapi(config)
    install_error_handlers(app)
    for area in (generate, chat, completions, tokenize, cloud, models, info, docs):
        app.include_router(area.router)
    if config.api_key is not None:
        app.add_middleware(ApiKeyGuard, api_key=config.api_key)
    app.add_middleware(CorsHeaders, origins=config.cors_allow_origin)  # the outer one: its answers need no key
    return app
