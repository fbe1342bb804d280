"""An engine that computes nothing: a thread that gives each request as many tokens as it asked for."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence

from engine.link.ipc import EngineEndpoint
from engine.link.messages import (
    AbortRequest,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Goodbye,
    StepOutput,
    TokenEvent,
)

HEARTBEAT_S = 0.5


class ScriptedEngine:
    """An engine that gives each open request one token in every step, cycling through `token_ids`."""

    def __init__(self, endpoint: EngineEndpoint, token_ids: Sequence[int], step_s: float) -> None:
        self._endpoint = endpoint
        self._token_ids = token_ids
        self.step_s = step_s
        self.is_over = threading.Event()
        self.num_left: dict[str, int] = {}
        """Open requests and the tokens they are still to get."""
        self._requests: dict[str, GenerationRequest] = {}
        self.num_requests = 0
        self.num_aborted = 0

    def serve(self) -> None:
        """Serve until `is_over`."""
        token_ids = itertools.cycle(self._token_ids)
        while not self.is_over.is_set():
            for message in self._endpoint.receive(0.0 if self.num_left else HEARTBEAT_S):
                self._take(message)
            token_id = next(token_ids)
            events = [self._next_event(request_id, token_id) for request_id in self.num_left]
            self._endpoint.send(StepOutput(events=events, stats=EngineStats(num_running=len(self.num_left))))
            self.num_left = {name: num_left for name, num_left in self.num_left.items() if num_left}
            self._requests = {name: request for name, request in self._requests.items() if name in self.num_left}
            time.sleep(self.step_s)

    def _take(self, message: GenerationRequest | AbortRequest | Goodbye) -> None:
        if isinstance(message, GenerationRequest):
            self.num_requests += 1
            self.num_left[message.request_id] = message.max_new_tokens
            self._requests[message.request_id] = message
        elif isinstance(message, AbortRequest) and self.num_left.pop(message.request_id, None) is not None:
            self.num_aborted += 1

    def _next_event(self, request_id: str, token_id: int) -> TokenEvent:
        request = self._requests[request_id]
        is_first = self.num_left[request_id] == request.max_new_tokens
        self.num_left[request_id] -= 1
        reason = None if self.num_left[request_id] else FinishReason.LENGTH
        event = TokenEvent(request_id=request_id, token_ids=[token_id], logprobs=[-0.5], finish_reason=reason)
        if is_first:
            event.queue_time_s = 0.0
            if request.has_prompt_logprobs:
                event.prompt_logprobs = [-1.0] * (len(request.prompt_token_ids) - 1)
        if num_top_tokens := request.sampling.num_top_tokens:
            event.top_token_ids = [list(range(num_top_tokens))]
            event.top_logprobs = [[-0.5] * num_top_tokens]
        return event


@contextlib.contextmanager
def scripted_engine(endpoint: EngineEndpoint, token_ids: Sequence[int], step_s: float) -> Iterator[ScriptedEngine]:
    """An engine that serves in a thread for the length of the block."""
    engine = ScriptedEngine(endpoint, token_ids, step_s)
    thread = threading.Thread(target=engine.serve, name="scripted-engine")
    thread.start()
    try:
        yield engine
    finally:
        engine.is_over.set()
        thread.join()
