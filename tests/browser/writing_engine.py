"""An engine that writes what a test tells it to, one token in every step, and holds blocks as long as it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import tokenizers

from engine.link.ipc import EngineEndpoint
from engine.link.messages import (
    AbortRequest,
    EngineStats,
    FinishReason,
    GenerationRequest,
    StepOutput,
    StepReport,
    TokenEvent,
)

HEARTBEAT_S = 0.2
STEP_S = 0.002
BLOCK_SIZE = 16
NUM_BLOCKS = 1024
USUAL_ANSWER = "Hello, world!"
END = "<|im_end|>"


@dataclasses.dataclass
class Writing:
    """A request that is being answered."""

    request: GenerationRequest
    token_ids: list[int]
    """The whole answer."""
    error: str | None
    """The error that ends it after its tokens."""
    num_written: int = 0

    @property
    def num_blocks(self) -> int:
        return -(-(len(self.request.prompt_token_ids) + self.num_written) // BLOCK_SIZE)

    def next_event(self) -> TokenEvent:
        request_id = self.request.request_id
        if self.num_written == len(self.token_ids):
            return TokenEvent(request_id=request_id, error=self.error)
        token_id = self.token_ids[self.num_written]
        event = TokenEvent(request_id=request_id, token_ids=[token_id], logprobs=[-0.5])
        if self.num_written == 0:
            event.queue_time_s = 0.001
        if num_top := self.request.sampling.num_top_tokens:
            event.top_token_ids = [[token_id, *range(5, 4 + num_top)]]
            event.top_logprobs = [[-0.5 - rank for rank in range(num_top)]]
        self.num_written += 1
        if self.num_written == self.request.max_new_tokens:
            event.finish_reason = FinishReason.LENGTH
        elif self.num_written == len(self.token_ids) and self.error is None:
            event.finish_reason = FinishReason.EOS_TOKEN
        return event


class WritingEngine:
    """Answers requests with `answers` in their order, then with `USUAL_ANSWER`. A test may change the public fields."""

    def __init__(self, endpoint: EngineEndpoint, tokenizer: tokenizers.Tokenizer) -> None:
        self._endpoint = endpoint
        self._tokenizer = tokenizer
        self._writings: dict[str, Writing] = {}
        self._num_allowed: int | None = None
        self.is_over = threading.Event()
        self.answers: list[str] = []
        self.error: str | None = None
        """The error that ends the answers to requests from now on."""
        self.requests: list[GenerationRequest] = []
        self.num_aborted = 0
        self.num_tokens = 0
        """Tokens that were written since the start."""
        self.step_s = STEP_S

    @property
    def stats(self) -> EngineStats:
        num_used = sum(writing.num_blocks for writing in self._writings.values())
        return EngineStats(
            num_running=len(self._writings), num_used_blocks=num_used, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE
        )

    @property
    def num_open(self) -> int:
        return len(self._writings)

    def prompt(self, index: int = -1) -> str:
        """The text of a request's prompt, special tokens included."""
        return str(self._tokenizer.decode(self.requests[index].prompt_token_ids, skip_special_tokens=False))

    def reset(self) -> None:
        """Write as at first, once the requests of the test before have gone."""
        self.answers, self.error, self.step_s = [], None, STEP_S
        self.requests, self.num_aborted = [], 0
        self.allow(None)

    def allow(self, num_tokens: int | None) -> None:
        """Let each request get so many tokens more, or any number; until then all wait once some number is used up."""
        self._num_allowed = num_tokens
        self._endpoint.wake()

    def serve(self) -> None:
        """Serve until `is_over`, or until the HTTP process has gone."""
        with contextlib.suppress(EOFError):
            while not self.is_over.is_set():
                for message in self._endpoint.receive(0.0 if self._is_writing else HEARTBEAT_S):
                    if isinstance(message, GenerationRequest):
                        self._begin(message)
                    elif isinstance(message, AbortRequest) and self._writings.pop(message.request_id, None):
                        self.num_aborted += 1
                self._step()

    @property
    def _is_writing(self) -> bool:
        return bool(self._writings) and self._num_allowed != 0

    def _begin(self, request: GenerationRequest) -> None:
        text = self.answers.pop(0) if self.answers else USUAL_ANSWER
        ids = self._tokenizer.encode(text + ("" if self.error else END), add_special_tokens=False).ids
        self._writings[request.request_id] = Writing(request, ids, self.error)
        self.requests.append(request)

    def _step(self) -> None:
        """Write a token of each answer, if there are any, and give a sign of life."""
        started = time.perf_counter()
        events = [writing.next_event() for writing in self._writings.values()] if self._is_writing else []
        for event in events:
            if event.is_terminal:
                del self._writings[event.request_id]
        if events and self._num_allowed is not None:
            self._num_allowed -= 1
        self.num_tokens += len(events)
        report = StepReport(
            num_sequences=len(events), num_draft_hits=[0] * len(events), total_s=time.perf_counter() - started
        )
        self._endpoint.send(StepOutput(events=events, stats=self.stats, reports=[report] if events else []))
        if events:
            time.sleep(self.step_s)


@contextlib.contextmanager
def writing_engine(endpoint: EngineEndpoint, tokenizer: tokenizers.Tokenizer) -> Iterator[WritingEngine]:
    """An engine that serves in a thread for the length of the block."""
    engine = WritingEngine(endpoint, tokenizer)
    thread = threading.Thread(target=engine.serve, name="writing-engine")
    thread.start()
    try:
        yield engine
    finally:
        engine.is_over.set()
        endpoint.wake()
        thread.join()
