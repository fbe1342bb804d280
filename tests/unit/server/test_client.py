"""EngineClient against the engine's end of the socket pair."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from engine.errors import EngineDeadError, GenerationError
from engine.ipc import EngineEndpoint
from engine.types import (
    AbortRequest,
    Down,
    EngineStats,
    FinishReason,
    GenerationRequest,
    StepOutput,
    TokenEvent,
)
from server.client import EngineClient
from tests.unit.server.harness import LIMITS

REQUEST = GenerationRequest(request_id="a", prompt_token_ids=[1, 2], max_new_tokens=3)


class Pair:
    """Both ends."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.client = EngineClient(ours)
        self.socket = theirs
        self.endpoint = EngineEndpoint(theirs)

    def publish(self, *events: TokenEvent, stats: EngineStats | None = None) -> None:
        self.endpoint.send(StepOutput(events=list(events), stats=stats or EngineStats()))

    async def received(self) -> list[Down]:
        return await asyncio.to_thread(self.endpoint.receive, 1.0)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    pair.endpoint.send(LIMITS)
    assert await pair.client.connect() == LIMITS
    yield pair
    pair.socket.close()
    await pair.client.close()


async def test_tokens_come_back_and_nothing_is_aborted(pair: Pair) -> None:
    with pair.client.generate(REQUEST) as events:
        assert await pair.received() == [REQUEST]
        pair.publish(TokenEvent(request_id="a", token_ids=[5], logprobs=[-1.0], queue_time_s=0.5))
        pair.publish(TokenEvent(request_id="b", token_ids=[6], logprobs=[-1.0]))
        pair.publish(
            TokenEvent(request_id="a", token_ids=[7], logprobs=[-2.0], finish_reason=FinishReason.LENGTH),
            stats=EngineStats(num_running=3),
        )
        ids = [event.token_ids async for event in events]
    assert ids == [[5], [7]]
    assert pair.client.stats.num_running == 3
    with pair.client.generate(REQUEST):
        assert await pair.received() == [REQUEST]  # and no abort before it


async def test_leaving_early_aborts(pair: Pair) -> None:
    with pair.client.generate(REQUEST) as events:
        pair.publish(TokenEvent(request_id="a", token_ids=[5], logprobs=[-1.0]))
        assert (await anext(events)).token_ids == [5]
    received: list[Down] = []
    while len(received) < 2:
        received += await pair.received()
    assert received == [REQUEST, AbortRequest("a")]


async def test_failed_request(pair: Pair) -> None:
    with pair.client.generate(REQUEST) as events:
        pair.publish(TokenEvent(request_id="a", error="boom"))
        with pytest.raises(GenerationError, match="boom"):
            await anext(events)


async def test_engine_dies(pair: Pair) -> None:
    assert pair.client.is_healthy
    with pair.client.generate(REQUEST) as events:
        pair.socket.close()
        with pytest.raises(EngineDeadError):
            await anext(events)
    assert pair.client.dead.is_set()
    assert not pair.client.is_healthy
    with pytest.raises(EngineDeadError), pair.client.generate(REQUEST):
        pass


async def test_engine_dies_before_it_is_ready() -> None:
    pair = Pair()
    pair.socket.close()
    with pytest.raises(EngineDeadError, match="before it was ready"):
        await pair.client.connect()
    await pair.client.close()
