"""Structured output: grammars are compiled beside the steps, and each step's logits are masked by them.

llguidance (https://github.com/guidance-ai/llguidance) does the parsing, on rank 0 alone, which samples. A request waits
here until its grammar is compiled; then its sequence carries the place that its output has reached.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from engine.link.config import GRAMMAR_LIMITS
from engine.link.errors import GenerationError
from engine.link.messages import GenerationRequest
from engine.scheduling.batch import ScheduledBatch, ScheduledSequence
from engine.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int32]

MASKS: dict[str, str] = {
    "cpu": "engine.sampling.grammar_cpu:apply_masks",
    "torch": "engine.sampling.grammar_torch:apply_masks",
    "triton": "engine.sampling.grammar_triton:apply_masks",
}
"""Backend name -> lazy "module:function", an `ApplyMasks`.

`torch` is the reference implementation, and runs anywhere.
"""

BYTES_PER_TOKEN = 1_200
"""Memory that llguidance takes to read a vocabulary: measured, 167 MB for 151,936 tokens and 57 MB for 49,152."""

MAX_COMPILED = 32
"""Compiled grammars that are kept, as many as in TGI; the least recently used goes first."""
NUM_COMPILING_THREADS = 4
"""The HTTP process lets a few hard grammars pass at a time, so easy ones find a thread."""
COMPILING_NICENESS = 5
"""A step's kernels go before compilations; llguidance lets go of Python's lock while it compiles."""
WORD_BITS = 32
"""Tokens of a word of a mask, also of one of green tokens."""


class ApplyMasks(Protocol):
    """Lays the masks of some rows on a step's logits."""

    def __call__(self, logits: torch.Tensor, rows: IntArray, masks: IntArray) -> None:
        """Set logits [all rows, vocab] float32 to -inf, in place, where the bits of their masks are 0.

        rows [masked] int32: which rows the masks belong to; masks [masked, words] int32, the lowest bit first.
        """


@dataclasses.dataclass(slots=True)
class CompiledGrammar:
    """A matcher at the beginning of a grammar, whose first mask is known.

    Its copies share a lexer, and so the states that their outputs have reached: what one of them pays, others don't.
    """

    matcher: LLMatcher
    is_used_up: bool = False
    """An output has failed, maybe because the lexer is at its limit: then every further copy would."""


class MatchedGrammar:
    """A sequence's `OutputGrammar` (`engine.scheduling.sequence`), which has a matcher of its own."""

    def __init__(self, compiled: CompiledGrammar) -> None:
        self._compiled = compiled
        self.matcher = compiled.matcher.deep_copy()
        self.error: str | None = None

    def advance(self, token_id: int) -> bool:
        return self.matcher.consume_token(token_id) or not self.check()

    def count_allowed(self, token_ids: SequenceOf[int]) -> int:
        return self.matcher.validate_tokens(list(token_ids))

    def forced(self) -> list[int]:
        return self.matcher.compute_ff_tokens()

    def check(self) -> bool:
        """True if the matcher has failed, as it does over its limits; sets `error` then."""
        if self.matcher.is_error():
            self.error = f"the output cannot be held to the grammar: {_first_line(self.matcher.get_error())}"
            self._compiled.is_used_up = True
        return self.error is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """A request that has waited for its grammar; one of `grammar` and `error` is None."""

    request: GenerationRequest
    arrival_time: float
    """`time.monotonic()` when the request came."""
    grammar: MatchedGrammar | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Compilation:
    request: GenerationRequest
    arrival_time: float
    grammar: Future[CompiledGrammar]


class Grammars:
    """Compiles the grammars of requests on threads of its own, and masks logits by them."""

    def __init__(
        self,
        tokenizer_file: Path,
        vocab_size: int,
        eos_token_ids: SequenceOf[int],
        num_threads: int,
        apply_masks: Callable[[], ApplyMasks],
    ) -> None:
        """`vocab_size` is that of the logits, `num_threads` compute masks.

        The tokenizer is read, and `apply_masks` called, by `prepare`, or else when the first grammar comes.
        """
        self.on_compiled: Callable[[], None] = lambda: None
        """Called whenever a compilation has ended, on any thread."""
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self.eos_token_ids = list(eos_token_ids)
        self._num_threads = num_threads
        self._make_apply_masks = apply_masks
        self._threads = ThreadPoolExecutor(NUM_COMPILING_THREADS, "grammars", _give_way)
        self._loading = threading.Lock()
        self._compiling: dict[str, _Compilation] = {}
        self._cache: OrderedDict[str, Future[CompiledGrammar]] = OrderedDict()

    def prepare(self) -> None:
        """Read the vocabulary before there are steps: llguidance holds the GIL for most of a second meanwhile.

        If it cannot be read, the log says so, and so does the error of each request that has a grammar.
        """
        try:
            _ = self._tokenizer
        except GenerationError as error:
            logger.warning("Grammars will be refused: %s", error)

    def compile(self, request: GenerationRequest) -> None:
        """Begin to compile a request's grammar; the request comes out of `take_compiled`, or is aborted here."""
        assert request.grammar is not None
        grammar = self._cached(request.grammar)
        self._compiling[request.request_id] = _Compilation(request, time.monotonic(), grammar)
        grammar.add_done_callback(lambda _: self.on_compiled())

    @property
    def adapter_names(self) -> set[str | None]:
        """The adapters that the requests name whose grammars are not ready."""
        return {compilation.request.adapter_id for compilation in self._compiling.values()}

    def take_compiled(self) -> list[Compiled]:
        """Hand out the requests whose grammars are ready or cannot be compiled."""
        ended = [name for name, compilation in self._compiling.items() if compilation.grammar.done()]
        return [_outcome(self._compiling.pop(name)) for name in ended]

    def abort(self, request_id: str) -> None:
        """Forget a request whose grammar is not ready; any other id is ignored."""
        compilation = self._compiling.pop(request_id, None)
        if compilation is None or any(other.grammar is compilation.grammar for other in self._compiling.values()):
            return
        if compilation.grammar.cancel():  # it has not begun
            assert compilation.request.grammar is not None
            self._cache.pop(compilation.request.grammar, None)

    def abort_all(self) -> list[str]:
        """Forget all requests whose grammars are not ready; their ids."""
        request_ids = list(self._compiling)
        for request_id in request_ids:
            self.abort(request_id)
        return request_ids

    @staticmethod
    def needs_tokens(sequence: Sequence) -> bool:
        """True where a grammar says what may follow."""
        return sequence.grammar is not None

    @staticmethod
    def select(batch: ScheduledBatch) -> list[ScheduledSequence]:
        """The sequences that have rows in this step and a grammar."""
        return [s for s in batch.scheduled if s.is_completing and s.sequence.grammar is not None]

    def apply(self, selected: SequenceOf[ScheduledSequence], logits: torch.Tensor) -> None:
        """Set to -inf, in place, what may not stand in the selected outputs; logits [all rows, vocab] float32.

        The masks go along the drafts. After a token of a draft that may not stand there, any may.
        """
        rows = [row for scheduled in selected for row in scheduled.rows]
        grammars = [_matched(scheduled) for scheduled in selected]
        masks = np.full((len(rows), num_words(self._vocab_size)), -1, np.int32)
        plain: list[tuple[LLMatcher, int]] = []
        drafted: list[tuple[LLMatcher, int, list[int]]] = []
        index = 0
        for scheduled, grammar in zip(selected, grammars, strict=True):
            if scheduled.draft:
                drafted.append((grammar.matcher, index, scheduled.draft))
            else:
                plain.append((grammar.matcher, index))
            index += len(scheduled.rows)
        address, row_bytes = masks.ctypes.data, masks.strides[0]
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, address, row_bytes, len(rows))
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, address, row_bytes, len(rows))
        for grammar in grammars:
            grammar.check()
        self._apply_masks(logits, np.array(rows, np.int32), masks)

    def _cached(self, text: str) -> Future[CompiledGrammar]:
        """The grammar `text`, compiled once for all who ask for it."""
        grammar = self._cache.get(text)
        if grammar is None or not _is_of_use(grammar):
            grammar = self._cache[text] = self._threads.submit(self._compile, text)
        self._cache.move_to_end(text)
        if len(self._cache) > MAX_COMPILED:
            self._cache.popitem(last=False)
        return grammar

    def _compile(self, text: str) -> CompiledGrammar:
        """The grammar `text`, and its first mask, on a compiling thread. Raises GenerationError."""
        with self._loading:
            tokenizer = self._tokenizer
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # it takes longer than all others, and copies know what it has found out
        if matcher.is_error():
            raise GenerationError(f"the grammar cannot be compiled: {_first_line(matcher.get_error())}")
        return CompiledGrammar(matcher)

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Whoever reads it first also compiles the kernel of `apply_masks`. Raises GenerationError."""
        if not self.eos_token_ids:
            raise GenerationError("the model has no end-of-sequence token, so no grammar could end")
        try:
            text = self._tokenizer_file.read_text(encoding="utf-8")
            tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self.eos_token_ids)
        except (OSError, ValueError) as error:
            raise GenerationError(f"{self._tokenizer_file.name} cannot be used for grammars: {error}") from error
        no_rows, no_masks = np.empty(0, np.int32), np.empty((0, num_words(self._vocab_size)), np.int32)
        self._apply_masks(torch.empty(0, self._vocab_size), no_rows, no_masks)
        return tokenizer

    @functools.cached_property
    def _apply_masks(self) -> ApplyMasks:
        return self._make_apply_masks()

    @functools.cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(self._num_threads)


def _matched(scheduled: ScheduledSequence) -> MatchedGrammar:
    assert isinstance(scheduled.sequence.grammar, MatchedGrammar)
    return scheduled.sequence.grammar


def _outcome(compilation: _Compilation) -> Compiled:
    request, arrival_time, grammar = compilation.request, compilation.arrival_time, compilation.grammar
    error = grammar.exception()
    if error is not None:
        return Compiled(request, arrival_time, error=str(error))
    return Compiled(request, arrival_time, MatchedGrammar(grammar.result()))


def _is_of_use(grammar: Future[CompiledGrammar]) -> bool:
    """Whether further requests can have copies of it, or wait for it."""
    return not grammar.done() or (grammar.exception() is None and not grammar.result().is_used_up)


def _give_way() -> None:
    """Lower the priority of a compiling thread."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + COMPILING_NICENESS)


def _first_line(text: str) -> str:
    """The message of an llguidance error, without the parser's state that follows it."""
    return text.strip().split("\n", 1)[0]


def num_words(vocab_size: int) -> int:
    """Words of a mask that has a bit for each token."""
    return -(-vocab_size // WORD_BITS)
