"""A small tokenizer built in memory, a scripted engine, and ways to reach the application with both; no fixtures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tokenizers
import uvicorn
from fastapi import FastAPI
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from engine.link.errors import GenerationError
from engine.link.messages import EngineReady, EngineStats, FinishReason, GenerationRequest, TokenEvent
from server.client import EngineClient
from server.config import ServerConfig
from server.edge.connection import Connection
from server.edge.connections import ConnectionLimits, ConnectionTable
from server.requests.grammar_pool import CheckingPool, _Place
from server.text.chat_format import ChatFormat

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SENTENCES = [
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    "What is deep learning? 你好，世界 👩‍👩‍👧 naïve café",
]
LIMITS = EngineReady(
    max_input_tokens=1023,
    max_total_tokens=1024,
    max_batch_prefill_tokens=4096,
    max_batch_total_tokens=8192,
    vocab_size=10**6,
)


def chat_format_of(template: str | None, **special_tokens: str) -> ChatFormat:
    return ChatFormat(templates={} if template is None else {"default": template}, special_tokens=special_tokens)


def write_model_folder(folder: Path, template: Any = CHATML) -> None:
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass
class Script:
    """What the engine does with every request."""

    events: list[TokenEvent] = field(default_factory=list)
    pause_s: float = 0.0
    """Seconds before each event."""
    stall_after: int | None = None
    """The number of events after which nothing comes any more."""
    error: str | None = None
    """The error that is raised after the events."""
    scripts: list[list[TokenEvent]] = field(default_factory=list)
    """Events of the first, second, ... request from now on, in place of `events`."""
    errors: list[str | None] = field(default_factory=list)
    """Errors of the first, second, ... request from now on, in place of `error`."""

    def take(self) -> tuple[list[TokenEvent], str | None]:
        events = self.scripts.pop(0) if self.scripts else self.events
        return events, self.errors.pop(0) if self.errors else self.error


class FakeEngine(EngineClient):
    """Plays a script; remembers what it was asked and which requests were left before their end."""

    def __init__(self) -> None:
        self.script = Script()
        self.requests: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.healthy = True
        self.dead = asyncio.Event()
        self.stats = EngineStats()
        self.limits_now = LIMITS

    @property
    def limits(self) -> EngineReady:
        return self.limits_now

    @property
    def is_healthy(self) -> bool:
        return self.healthy

    @contextlib.contextmanager
    def generate(self, request: GenerationRequest) -> Iterator[AsyncIterator[TokenEvent]]:
        self.requests.append(request)
        ended: list[bool] = []
        try:
            yield self._play(self.script, ended)
        finally:
            if not ended:
                self.aborted.append(request.request_id)

    async def _play(self, script: Script, ended: list[bool]) -> AsyncIterator[TokenEvent]:
        events, error = script.take()
        for index, event in enumerate(events):
            if index == script.stall_after:
                await asyncio.sleep(60)
            await asyncio.sleep(script.pause_s)
            if event.is_terminal:
                ended.append(True)
            yield event
        if error is not None:
            ended.append(True)
            raise GenerationError(error)


class ObligingEngine(FakeEngine):
    """Plays `token_ids`, with what the request asks for: prompt logprobs, likeliest tokens, not more than so many."""

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__()
        self._token_ids = token_ids
        self.error: str | None = None
        """The error that is raised in place of the last token."""

    def generate(self, request: GenerationRequest) -> contextlib.AbstractContextManager[AsyncIterator[TokenEvent]]:
        ids = self._token_ids[: request.max_new_tokens]
        reason = FinishReason.EOS_TOKEN if len(ids) == len(self._token_ids) else FinishReason.LENGTH
        events = one_by_one(ids, reason)
        if request.has_prompt_logprobs:
            num_scored = len(request.prompt_token_ids) - 1
            events[0].prompt_logprobs = [-1.5] * num_scored
            if request.has_prompt_ranks:
                events[0].prompt_ranks = [7] * num_scored
            if num_top := request.num_prompt_top_tokens:
                events[0].prompt_top_token_ids = [list(range(5, 5 + num_top))] * num_scored
                events[0].prompt_top_logprobs = [[-0.25] * num_top] * num_scored
        if num_top := request.sampling.num_top_tokens:
            for event in events:
                event.top_token_ids = [list(range(5, 5 + num_top))]
                event.top_logprobs = [[-0.25] * num_top]
        self.script = Script(events if self.error is None else events[:-1], error=self.error)
        return super().generate(request)


def one_by_one(
    ids: list[int], reason: FinishReason | None = FinishReason.EOS_TOKEN, logprob: float = -0.5
) -> list[TokenEvent]:
    """An event per token; the last one ends the sequence."""
    events = [TokenEvent(request_id="", token_ids=[token_id], logprobs=[logprob]) for token_id in ids]
    events[0].queue_time_s = 0.001
    events[-1].finish_reason = reason
    return events


def make_config(**changes: Any) -> ServerConfig:
    """`is_rendering_here` saves each of the tests' servers a process."""
    fields = {"compute_type": "test", "is_rendering_here": True, **changes}
    return ServerConfig(model_id="org/model", model_path="", listen_fd=-1, engine_fd=-1, **fields)


SPARE_PLACES: list[_Place] = []
"""Idle processes that check grammars, with their threads, which applications hand on: to start one takes 0.3 s."""


def borrow_places(pool: CheckingPool) -> None:
    for index in range(min(len(SPARE_PLACES), len(pool._places))):
        pool._places[index] = SPARE_PLACES.pop()


def give_places_back(pool: CheckingPool) -> None:
    """Keep what is idle and has a process; the pool's `close` ends the rest."""
    idle = [place for place in pool._places if place.job is None and place.process.child is not None]
    pool._places = [place for place in pool._places if place not in idle]
    SPARE_PLACES.extend(idle)


def end_spare_places() -> None:
    for place in SPARE_PLACES:
        place.thread.submit(place.process.close)
        place.thread.shutdown()
    SPARE_PLACES.clear()


@contextlib.asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    service = app.state.service
    borrow_places(service.grammars.pool)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    # this transport has no lifespan, at whose end the application does that
    give_places_back(service.grammars.pool)
    service.grammars.close()
    service.chats.close()
    service.tokenizer._long_texts.close()


@contextlib.contextmanager
def running_server(app: FastAPI, limits: ConnectionLimits | None = None) -> Iterator[uvicorn.Server]:
    """A real server on a loopback port, for what the in-process transport cannot show."""
    connection = Connection.listed_in(ConnectionTable(limits or ConnectionLimits()))
    config = uvicorn.Config(
        app, port=0, http=connection, ws="none", log_config=None, server_header=False, lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def url_of(server: uvicorn.Server) -> str:
    port = server.servers[0].sockets[0].getsockname()[1]
    return f"http://127.0.0.1:{port}"


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The JSON of each event."""
    frames = [frame for frame in body.split(b"\n\n") if frame]
    assert all(frame.startswith(b"data: ") for frame in frames)
    return [json.loads(frame[len(b"data: ") :]) for frame in frames if frame != b"data: [DONE]"]
