"""EngineClient against the engine's end of the socket pair."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import AsyncIterator

import pytest

from engine.link.errors import EngineDeadError, EngineHungError, GenerationError
from engine.link.ipc import EngineEndpoint
from engine.link.messages import (
    AbortRequest,
    AdapterReply,
    Down,
    EngineStarting,
    EngineStats,
    FinishReason,
    GenerationRequest,
    LoadAdapter,
    StepOutput,
    StepReport,
    TokenEvent,
    UnloadAdapter,
)
from engine.link.progress import Stage
from server import client as client_module
from server.client import EngineClient
from tests.unit.server.harness import LIMITS

REQUEST = GenerationRequest(request_id="a", prompt_token_ids=[1, 2], max_new_tokens=3)


class Pair:
    """The client and the engine's end of the socket pair."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.client = EngineClient(ours, hung_silence_s=0.2)
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
        ids = [token_id async for event in events for token_id in event.token_ids]
    assert ids == [5, 7]
    assert pair.client.stats.num_running == 3
    with pair.client.generate(REQUEST):
        assert await pair.received() == [REQUEST]  # and no abort before it


async def test_every_frame_is_told_with_the_time_of_handing_it_out(pair: Pair) -> None:
    told: list[tuple[StepOutput, float]] = []
    pair.client.observe_output = lambda output, seconds: told.append((output, seconds))
    with pair.client.generate(REQUEST) as events:
        output = StepOutput(
            events=[TokenEvent(request_id="a", finish_reason=FinishReason.LENGTH)],
            stats=EngineStats(),
            reports=[StepReport(is_prefill=True, num_sequences=1)],
        )
        pair.endpoint.send(output)
        await anext(events)
    ((seen, seconds),) = told
    assert seen == output and 0 < seconds < 1


async def test_what_an_engine_says_while_it_starts_is_told() -> None:
    pair = Pair()
    told: list[EngineStarting] = []
    pair.client.observe_start = told.append
    report = EngineStarting(stage=Stage.LOADING, done=0.5, text="half")
    pair.endpoint.send(report)
    connecting = asyncio.create_task(pair.client.connect())
    while not told:
        await asyncio.sleep(0.01)
    assert not connecting.done()
    pair.endpoint.send(LIMITS)
    await connecting
    assert told == [report]
    pair.socket.close()
    await pair.client.close()


async def test_leaving_early_aborts(pair: Pair) -> None:
    with pair.client.generate(REQUEST) as events:
        pair.publish(TokenEvent(request_id="a", token_ids=[5], logprobs=[-1.0]))
        assert (await anext(events)).token_ids == [5]
    received: list[Down] = []
    while len(received) < 2:
        received += await pair.received()
    assert received == [REQUEST, AbortRequest("a")]


async def test_what_nobody_takes_is_held_in_one_event(pair: Pair) -> None:
    with pair.client.generate(REQUEST) as events:
        for number in range(1000):
            pair.publish(TokenEvent(request_id="a", token_ids=[number], logprobs=[-1.0]))
            await asyncio.sleep(0)
        inbox = pair.client._inboxes["a"]
        pair.publish(TokenEvent(request_id="a", error="boom"))
        while "a" in pair.client._inboxes:
            pair.publish()
            await asyncio.sleep(0.01)
        assert len(inbox._items) == 2, "tokens, and the error behind them"
        event = await anext(events)
        assert (event.token_ids, event.logprobs) == (list(range(1000)), [-1.0] * 1000)
        with pytest.raises(GenerationError, match="boom"):
            await anext(events)


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


async def test_a_refusal_ends_what_is_open_and_whatever_comes(pair: Pair) -> None:
    with pair.client.generate(REQUEST) as events:
        pair.client.refuse(GenerationError("the server is stopping"))
        with pytest.raises(GenerationError, match="stopping"):
            await anext(events)
    with pytest.raises(GenerationError, match="stopping"), pair.client.generate(REQUEST):
        pass
    received: list[Down] = []
    while len(received) < 2:
        received += await pair.received()
    assert received == [REQUEST, AbortRequest("a")], "its memory is freed in the engine"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WATCH_S", 0.02)


@pytest.mark.usefixtures("impatient")
async def test_a_silent_engine_hangs(pair: Pair) -> None:
    with pair.client.generate(REQUEST) as events:
        await asyncio.wait_for(pair.client.watch(), 5)
        with pytest.raises(EngineHungError, match="nothing was heard of it"):
            await anext(events)
    with pytest.raises(EngineHungError):
        pair.client.raise_if_dead()


@pytest.mark.usefixtures("impatient")
async def test_an_engine_that_speaks_does_not_hang(pair: Pair) -> None:
    watcher = asyncio.create_task(pair.client.watch())
    for _ in range(100):
        pair.publish()
        await asyncio.sleep(0.01)
    assert not watcher.done()
    pair.client.raise_if_dead()
    pair.socket.close()
    await asyncio.wait_for(watcher, 5)
    with pytest.raises(EngineDeadError):
        pair.client.raise_if_dead()


@pytest.mark.usefixtures("impatient")
async def test_a_pause_of_this_process_is_not_taken_for_silence(pair: Pair) -> None:
    watcher = asyncio.create_task(pair.client.watch())
    await asyncio.sleep(0.05)
    time.sleep(0.5)  # noqa: ASYNC251 - the whole process stands still, as when a container is paused
    await asyncio.sleep(0)
    pair.publish()
    await asyncio.sleep(0.05)
    assert not watcher.done()
    watcher.cancel()


async def test_waiting_for_a_slow_start_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "READY_LOG_S", 0.05)
    pair = Pair()
    connecting = asyncio.create_task(pair.client.connect())
    with caplog.at_level("INFO"):
        await asyncio.sleep(0.2)
    assert "Waiting for shard to be ready..." in caplog.text
    pair.endpoint.send(LIMITS)
    assert await connecting == LIMITS
    pair.socket.close()
    await pair.client.close()


async def test_replies_about_adapters_come_in_the_order_of_the_calls(pair: Pair) -> None:
    calls = [LoadAdapter("a", "/a"), UnloadAdapter("a"), LoadAdapter("b", "/b")]
    tasks = [asyncio.create_task(pair.client.change_adapters(call)) for call in calls]
    received: list[Down] = []
    while len(received) < len(calls):
        received += await pair.received()
    assert received == calls
    replies = [AdapterReply(), AdapterReply("no"), AdapterReply("nor that")]
    for part in (replies[:1], replies[1:]):
        pair.endpoint.send(StepOutput(events=[], stats=EngineStats(), replies=part))
    assert await asyncio.gather(*tasks) == replies


async def test_a_call_about_adapters_ends_with_the_engine(pair: Pair) -> None:
    task = asyncio.create_task(pair.client.change_adapters(UnloadAdapter("a")))
    await pair.received()
    pair.socket.close()
    with pytest.raises(EngineDeadError):
        await task
    with pytest.raises(EngineDeadError):
        await pair.client.change_adapters(UnloadAdapter("a"))


async def test_replies_that_come_after_a_refusal_are_dropped(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """The engine lives: it does not know that nobody waits any more. Nor is an error logged that nobody took."""
    tasks = [asyncio.create_task(pair.client.change_adapters(UnloadAdapter(name))) for name in "ab"]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    pair.client.refuse(GenerationError("the server is stopping"))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, GenerationError]
    pair.endpoint.send(StepOutput(events=[], stats=EngineStats(num_running=7), replies=[AdapterReply()] * 2))
    while pair.client.stats.num_running != 7:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    assert not pair.client.dead.is_set() and not pair.client._replies
    del outcomes, tasks
    gc.collect()
    assert not caplog.records


async def test_a_call_that_can_not_be_sent_takes_nobody_else_s_reply(pair: Pair) -> None:
    with pytest.raises(UnicodeEncodeError):
        await pair.client.change_adapters(LoadAdapter("a", "\ud800"))
    task = asyncio.create_task(pair.client.change_adapters(UnloadAdapter("b")))
    assert await pair.received() == [UnloadAdapter("b")]
    pair.endpoint.send(StepOutput(events=[], stats=EngineStats(), replies=[AdapterReply("no")]))
    assert await asyncio.wait_for(task, 5) == AdapterReply("no")
