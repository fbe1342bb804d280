"""Bodies on their way in: slow ones end, and all of them together hold no more than so much memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.types import Message

from server.edge.intake import Intake, IntakeLimits
from server.errors import BodyError, OverloadedError
from tests.unit.server.harness import client_of


def limits(**changes: Any) -> IntakeLimits:
    defaults: dict[str, Any] = {"max_body_bytes": 1000, "max_total_bytes": 2000, "silence_s": 0.2, "patience_s": 0.05}
    return IntakeLimits(**(defaults | changes))


def request_of(pieces: AsyncIterator[bytes], **headers: str) -> Request:
    async def receive() -> Message:
        try:
            return {"type": "http.request", "body": await anext(pieces), "more_body": True}
        except StopAsyncIteration:
            return {"type": "http.request", "body": b"", "more_body": False}

    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": encoded}, receive)


async def sent(*pieces: bytes, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(pause_s)
        yield piece


async def endless_pause(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    await asyncio.sleep(60)


async def test_memory_is_held_until_the_request_ends() -> None:
    intake = Intake(limits())
    request = request_of(sent(b"abc", b"de"))
    assert await intake.receive(request) == b"abcde"
    intake.hold(request, 7)
    assert intake.num_bytes == 12
    intake.release(request.scope)
    intake.release(request.scope)
    assert intake.num_bytes == 0


@pytest.mark.parametrize("announced", ["1001", "9" * 5_000])
async def test_too_long_a_body_is_refused_unread(announced: str) -> None:
    with pytest.raises(BodyError, match="length limit exceeded"):
        await Intake(limits()).receive(request_of(endless_pause(), content_length=announced))


async def test_a_body_that_pauses_is_given_up() -> None:
    with pytest.raises(BodyError) as caught:
        await Intake(limits()).receive(request_of(endless_pause(b"{")))
    assert caught.value.status == 408


async def test_a_body_that_drips_is_given_up() -> None:
    dripping = request_of(sent(*[b"x"] * 100, pause_s=0.02))
    with pytest.raises(BodyError) as caught:
        await Intake(limits(grace_s=0.1, min_bytes_per_s=100)).receive(dripping)
    assert caught.value.status == 408


async def test_a_slow_body_that_is_not_too_slow_is_received() -> None:
    steady = request_of(sent(*[b"x" * 10] * 20, pause_s=0.02))
    assert await Intake(limits(grace_s=0.1, min_bytes_per_s=100)).receive(steady) == b"x" * 200


async def test_when_memory_is_short_a_pausing_body_gives_way() -> None:
    intake = Intake(limits(silence_s=60.0))
    pausing = asyncio.create_task(intake.receive(request_of(endless_pause(b"x" * 900))))
    complete = request_of(sent(b"x" * 900))
    await intake.receive(complete)
    await asyncio.sleep(0.1)
    assert len(await intake.receive(request_of(sent(b"x" * 900)))) == 900
    with pytest.raises(BodyError) as caught:
        await pausing
    assert caught.value.status == 408
    with pytest.raises(OverloadedError):
        await intake.receive(request_of(sent(b"x" * 900)))
    intake.release(complete.scope)
    assert await intake.receive(request_of(sent(b"x" * 900)))


async def test_requests_give_back_what_their_bodies_held(app: FastAPI) -> None:
    intake = app.state.service.intake
    async with client_of(app) as client:
        for body in ({"inputs": "x"}, {"inputs": 5}, {"inputs": "x" * 19_000}, {"inputs": "x" * 25_000}):
            await client.post("/generate", json=body)
            await client.post("/generate_stream", json=body)
            assert intake.num_bytes == 0


async def test_a_full_memory_is_a_429(app: FastAPI) -> None:
    app.state.service.intake.num_bytes = 60_000_000
    async with client_of(app) as client:
        response = await client.post("/v1/chat/completions", json={"messages": []})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
