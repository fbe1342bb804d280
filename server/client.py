"""EngineClient: the HTTP process's end of the socket pair, with one reader task and one inbox per open request."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator

from engine.link.errors import EngineDeadError, EngineHungError, GenerationError
from engine.link.ipc import RECEIVE_BYTES, decode_up, encode_frame, take_frames
from engine.link.messages import (
    AbortRequest,
    AdapterReply,
    EngineReady,
    EngineStarting,
    EngineStats,
    GenerationRequest,
    Goodbye,
    LoadAdapter,
    StepOutput,
    TokenEvent,
    UnloadAdapter,
    Up,
)

logger = logging.getLogger(__name__)

UNHEALTHY_SILENCE_S = 10.0
"""The engine speaks at least once a second while idle and after every step; on a CPU a step takes 5 s at most."""
WATCH_S = 1.0
"""Silence is counted in steps of this length."""
READY_LOG_S = 10.0
"""The log says once in this time that the engine is still loading."""


class Inbox:
    """The events of one request that have come and were not taken yet.

    Tokens join the last event that waits, as in `engine.link.ipc`. A slow reader holds up numbers here, at most
    `max_new_tokens` of each kind, and not an event for each token.
    """

    def __init__(self) -> None:
        self._items: collections.deque[TokenEvent | Exception] = collections.deque()
        self._has_items = asyncio.Event()

    def put(self, item: TokenEvent | Exception) -> None:
        last = self._items[-1] if self._items else None
        if isinstance(last, TokenEvent) and isinstance(item, TokenEvent) and item.error is None:
            last.extend(item)
        else:
            self._items.append(item)
            self._has_items.set()

    async def take(self) -> TokenEvent | Exception:
        await self._has_items.wait()
        item = self._items.popleft()
        if not self._items:
            self._has_items.clear()
        return item


class EngineClient:
    """Submits requests and hands their events out; also knows the engine's limits, counters and health."""

    is_stopping = False
    """Whether the server lets nobody in any more: a stream that would have no end ends now."""

    def __init__(self, sock: socket.socket, hung_silence_s: float = 20.0) -> None:
        """An engine that is silent for `hung_silence_s` counts as hung."""
        sock.setblocking(False)
        self._sock = sock
        self._hung_silence_s = hung_silence_s
        self._writer: asyncio.StreamWriter | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._limits: asyncio.Future[EngineReady] | None = None
        self._replies: collections.deque[asyncio.Future[AdapterReply]] = collections.deque()
        """The calls whose reply has not come, in the order of their messages, those that have ended among them."""
        self._reader_task: asyncio.Task[None] | None = None
        self._last_heard = 0.0
        self._refusal: Exception | None = None
        self._death: Exception | None = None
        self.stats = EngineStats()
        self.dead = asyncio.Event()
        self.observe_output: Callable[[StepOutput, float], None] = lambda output, seconds: None
        """Called with every frame and the seconds that handing its events out took."""
        self.observe_start: Callable[[EngineStarting], None] = lambda message: None
        """Called with what the engine says before it is ready."""

    async def connect(self) -> EngineReady:
        """Start reading and wait until the engine is ready. Raises EngineDeadError if it ends before that."""
        reader, self._writer = await asyncio.open_connection(sock=self._sock)
        self._limits = asyncio.get_running_loop().create_future()
        self._reader_task = asyncio.create_task(self._read(reader), name="engine-reader")
        while not (await asyncio.wait([self._limits], timeout=READY_LOG_S))[0]:
            logger.info("Waiting for shard to be ready...")
        return self.limits

    @property
    def limits(self) -> EngineReady:
        assert self._limits is not None
        return self._limits.result()

    @property
    def is_healthy(self) -> bool:
        """Whether the engine is there and has spoken lately."""
        return not self.dead.is_set() and time.monotonic() - self._last_heard < UNHEALTHY_SILENCE_S

    @contextlib.contextmanager
    def generate(self, request: GenerationRequest) -> Iterator[AsyncIterator[TokenEvent]]:
        """Submit `request`. The iterator ends after the terminal event; leaving the block early aborts the request.

        The iterator raises GenerationError for a failed request, and whatever `refuse` was called with.
        """
        if self._refusal is not None:
            raise self._refusal
        inbox = self._inboxes[request.request_id] = Inbox()
        self._send(encode_frame(request))
        try:
            yield self._events(inbox)
        finally:
            if self._inboxes.pop(request.request_id, None) is not None:
                self._send(encode_frame(AbortRequest(request.request_id)))

    async def change_adapters(self, message: LoadAdapter | UnloadAdapter) -> AdapterReply:
        """Tell the engine of an adapter that comes or goes. Raises what `refuse` was called with."""
        if self._refusal is not None:
            raise self._refusal
        frame = encode_frame(message)
        reply: asyncio.Future[AdapterReply] = asyncio.get_running_loop().create_future()
        reply.add_done_callback(asyncio.Future.exception)  # the caller may have gone: nobody else would look at it
        self._replies.append(reply)
        self._send(frame)
        return await asyncio.shield(reply)

    @staticmethod
    async def _events(inbox: Inbox) -> AsyncIterator[TokenEvent]:
        while True:
            event = await inbox.take()
            if isinstance(event, Exception):
                raise event
            if event.error is not None:
                raise GenerationError(event.error)
            yield event
            if event.is_terminal:
                return

    def refuse(self, error: Exception) -> None:
        """End every open request with `error`, and refuse any that comes from now on."""
        self._refusal = error
        for inbox in self._inboxes.values():
            inbox.put(error)
        for reply in self._replies:  # an engine that lives replies all the same
            if not reply.done():
                reply.set_exception(error)

    async def watch(self) -> None:
        """Return when the engine is dead, or has been silent for so long that it must hang.

        Silence counts only while this process itself runs: a pause of both processes, as of a container, is no hang.
        """
        silence_s = 0.0
        while not self.dead.is_set() and silence_s < self._hung_silence_s:
            heard = self._last_heard
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.dead.wait(), WATCH_S)
            silence_s = silence_s + WATCH_S if heard == self._last_heard else 0.0
        if not self.dead.is_set():
            text = f"the engine hangs: nothing was heard of it for {self._hung_silence_s:g} s"
            self._mark_dead(EngineHungError(text))

    def raise_if_dead(self) -> None:
        """Raises EngineDeadError or EngineHungError when there is no engine any more."""
        if self._death is not None:
            raise self._death

    def _send(self, frame: bytes) -> None:
        # The writer is not drained: admission bounds the number of requests, and the reader notices a dead engine.
        if self._writer is not None and not self.dead.is_set():
            self._writer.write(frame)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        buffer = bytearray()
        try:
            while data := await reader.read(RECEIVE_BYTES):
                buffer += data
                for message in take_frames(buffer, decode_up):
                    self._take(message)
        except ConnectionError:
            pass
        except Exception:
            logger.exception("The engine's message can't be read")
        finally:
            if not self.dead.is_set():
                self._mark_dead(EngineDeadError("the engine has ended"))

    def _take(self, message: Up) -> None:
        self._last_heard = time.monotonic()
        if isinstance(message, EngineStarting):
            self.observe_start(message)
            return
        if isinstance(message, EngineReady):
            assert self._limits is not None
            self._limits.set_result(message)
            return
        self.stats = message.stats
        started = time.perf_counter()
        for event in message.events:
            inbox = self._inboxes.get(event.request_id)
            if inbox is None:
                continue
            if event.is_terminal:  # the engine has forgotten the request: nothing is left to abort
                del self._inboxes[event.request_id]
            inbox.put(event)
        for reply in message.replies:
            waiting = self._replies.popleft()
            if not waiting.done():
                waiting.set_result(reply)
        self.observe_output(message, time.perf_counter() - started)

    def _mark_dead(self, death: Exception) -> None:
        self._death = death
        self.dead.set()
        self.refuse(death)
        assert self._limits is not None
        if not self._limits.done():
            self._limits.set_exception(EngineDeadError("the engine ended before it was ready"))

    def say_goodbye(self) -> None:
        """Tell the engine that no request is left and none will come."""
        self._send(encode_frame(Goodbye()))

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        if self._reader_task is not None:
            await self._reader_task
