"""The live dashboard: its page, and the stream that it is drawn from."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator

from fastapi import Request, Response

from server.answers.broadcast import Broadcast
from server.answers.sse import EVENT_HEADERS, EventStream, event
from server.operation import Area, Operation
from server.routes.ui import page_answer
from server.service import GenerationService
from server.telemetry.live import PERIOD_S, Line, Sampler
from server.ui.pages import DASHBOARD, page_files

area = Area()

SERVER = "server"
"""The name of a server's only replica, which is itself."""


def broadcast_figures(service: GenerationService) -> Broadcast:
    """The figures of `service`, once a second, for all dashboards that are open."""

    async def lines() -> AsyncGenerator[bytes]:
        sampler = Sampler(service.metrics, lambda: service.engine.stats, service.engine.limits.pid)
        while not service.engine.is_stopping:
            await asyncio.sleep(PERIOD_S)
            yield event(Line({SERVER: sampler.sample()}))

    return Broadcast(lines)


@area.serve(
    Operation(
        method="GET",
        path="/dashboard",
        summary="A page that shows what the server is doing",
        text="text/html; charset=utf-8",
        is_open=True,
    )
)
async def dashboard(request: Request) -> Response:
    return page_answer(request, page_files()[DASHBOARD])


@area.serve(
    Operation(
        method="GET",
        path="/dashboard/events",
        summary="What the server is doing, an event a second",
        events=(Line,),
        errors=(429, 503),
    )
)
async def events(request: Request) -> Response:
    """HEAD says whether a client may have the stream; it opens none."""
    if request.method == "HEAD":
        return Response(headers=EVENT_HEADERS)
    figures: Broadcast = request.app.state.figures
    reader = figures.join()
    return EventStream(reader.events(), {}, functools.partial(figures.leave, reader))
