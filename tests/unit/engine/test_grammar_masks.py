"""Grammars beside the steps: compiled, cached, aborted, refused; and the masks that they lay on logits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance.numpy
import msgspec
import numpy as np
import pytest
import torch
from llguidance import LLMatcher

import engine.core
from engine.core import EngineCore
from engine.link.config import GRAMMAR_LIMITS
from engine.link.ipc import EngineEndpoint, decode_up, encode_frame, take_frames
from engine.link.messages import AbortRequest, FinishReason, GenerationRequest, SamplingParams, StepOutput, TokenEvent
from engine.link.registry import import_entry
from engine.runner import StepResult
from engine.sampling import grammar, grammar_torch
from engine.sampling.grammar import MASKS, CompiledGrammar, Grammars, MatchedGrammar, num_words
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_limit import StepLimit
from tests.tiny_model import EOS_TOKEN_IDS, VOCAB_SIZE, write_tokenizer
from tests.unit.engine.builders import make_batch, make_request
from tests.unit.engine.core_builders import assemble_core

A, B, C = (ord(letter) - ord("!") for letter in "abc")
"""Their tokens in the tiny tokenizer, whose alphabet begins with `!`."""


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder / "tokenizer.json"


def make_grammars(tokenizer_file: Path, eos_token_ids: list[int] = EOS_TOKEN_IDS) -> Grammars:
    return Grammars(tokenizer_file, VOCAB_SIZE, eos_token_ids, 1, lambda: grammar_torch.apply_masks)


def with_regex(name: str, regex: str, **changes: Any) -> GenerationRequest:
    request = make_request(name, [1, 2, 3], max_new_tokens=20)
    return msgspec.structs.replace(request, grammar=LLMatcher.grammar_from_regex(regex), **changes)


def compile_one(grammars: Grammars, regex: str) -> MatchedGrammar:
    is_compiled = threading.Event()
    grammars.on_compiled = is_compiled.set
    grammars.compile(with_regex("any", regex))
    assert is_compiled.wait(30)
    (compiled,) = grammars.take_compiled()
    assert compiled.grammar is not None
    return compiled.grammar


def held_sequence(matched: MatchedGrammar | None) -> Sequence:
    return Sequence(make_request("any", [1, 2, 3]), arrival_time=0.0, grammar=matched)


def allowed(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 264, 1000])
def test_all_ways_to_apply_masks_are_that_of_llguidance(vocab_size: int) -> None:
    chance = np.random.default_rng(vocab_size)
    masks = chance.integers(-(2**31), 2**31, (4, num_words(vocab_size)), np.int32)
    masks[1], masks[2] = -1, 0
    rows = np.array([0, 2, 3, 5], np.int32)
    logits = torch.from_numpy(chance.standard_normal((7, vocab_size), np.float32))
    expected = logits.numpy().copy()
    masked = expected[rows]
    llguidance.numpy.apply_token_bitmask_inplace(masked, masks)
    expected[rows] = masked
    for name in MASKS.keys() - {"triton"}:  # tests/interpreted has it
        apply_masks = import_entry(MASKS, name, "mask")
        result = logits.clone()
        apply_masks(result, rows, masks)
        np.testing.assert_array_equal(result.numpy(), expected)


def test_rows_are_masked_along_drafts_and_others_are_left(tokenizer_file: Path) -> None:
    grammars = make_grammars(tokenizer_file)
    first, second = compile_one(grammars, "ab*"), compile_one(grammars, "[bc]")
    sequences = [held_sequence(first), held_sequence(None), held_sequence(second), held_sequence(first)]
    # The last one computes a piece of its prompt, so it has no row.
    batch = make_batch(sequences, [3, 3, 3, 1], [[A, B], [A], [], []])
    logits = torch.zeros(6, VOCAB_SIZE)
    grammars.apply(grammars.select(batch), logits)
    ends = sorted(EOS_TOKEN_IDS)
    assert allowed(logits) == [[A], [B, *ends], [B, *ends], [*range(VOCAB_SIZE)], [*range(VOCAB_SIZE)], [B, C]]
    assert first.count_allowed([A, B, C]) == 2, "a draft is only tried"
    assert first.forced() == [A]


def test_all_ends_count_and_only_they_are_left_when_nothing_may_follow(tokenizer_file: Path) -> None:
    grammars = make_grammars(tokenizer_file)
    for end in EOS_TOKEN_IDS:
        matched = compile_one(grammars, "a")
        assert matched.advance(A)
        logits = torch.zeros(1, VOCAB_SIZE)
        grammars.apply(grammars.select(make_batch([held_sequence(matched)], [3])), logits)
        assert allowed(logits) == [sorted(EOS_TOKEN_IDS)]
        assert matched.advance(end) and matched.error is None


def test_a_token_that_may_not_stand_there_is_an_error(tokenizer_file: Path) -> None:
    matched = compile_one(make_grammars(tokenizer_file), "ab")
    assert not matched.advance(B)
    assert matched.error is not None and "\n" not in matched.error
    assert matched.error.startswith("the output cannot be held to the grammar: ")


def test_compiled_grammars_are_kept_and_each_request_has_its_own_place(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MAX_COMPILED", 2)
    texts: list[str] = []

    def count(tokenizer: Any, text: str, **options: Any) -> LLMatcher:
        texts.append(text)
        return LLMatcher(tokenizer, text, **options)

    monkeypatch.setattr(grammar, "LLMatcher", count)
    grammars = make_grammars(tokenizer_file)
    one, other = compile_one(grammars, "ab"), compile_one(grammars, "ab")
    assert one.advance(A) and other.forced() == [A, B]
    for regex in ("b", "ab", "c", "ab", "b"):
        compile_one(grammars, regex)
    assert len(texts) == 4, "`b` gave way to `c`, since `ab` had been asked for later"


class RecordedMatcher:
    """A matcher that notes on which threads its masks are computed."""

    def __init__(self, threads: list[str], *args: Any, **options: Any) -> None:
        self._matcher = LLMatcher(*args, **options)
        self._threads = threads

    def compute_bitmask(self) -> bytes:
        self._threads.append(threading.current_thread().name)
        return self._matcher.compute_bitmask()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)


def test_the_first_mask_is_computed_where_grammars_are_compiled_and_once_for_all_who_ask(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    monkeypatch.setattr(grammar, "LLMatcher", lambda *args, **options: RecordedMatcher(threads, *args, **options))
    grammars = make_grammars(tokenizer_file)
    for index in range(8):
        grammars.compile(with_regex(f"request {index}", "ab"))
    compiled: list[grammar.Compiled] = []
    while len(compiled) < 8:
        compiled += grammars.take_compiled()
        time.sleep(0.01)
    matched = [outcome.grammar for outcome in compiled]
    assert len(threads) == 1 and threads[0].startswith("grammars")
    assert len({id(one.matcher) for one in matched if one is not None}) == 8


def test_a_grammar_whose_lexer_is_used_up_is_compiled_anew(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs share its states, so that all further ones would fail with the first."""
    monkeypatch.setitem(GRAMMAR_LIMITS, "max_lexer_states", 60)
    grammars = make_grammars(tokenizer_file)

    def length(matched: MatchedGrammar) -> int:
        """Number of tokens until the output cannot be held any longer."""
        for count in range(200):
            grammars.apply(grammars.select(make_batch([held_sequence(matched)], [3])), torch.zeros(1, VOCAB_SIZE))
            if matched.error is not None or not matched.advance(A if count % 3 else B):
                return count
        raise AssertionError("it never fails")

    lengths = [length(compile_one(grammars, "[ab]*a[ab]{60}c")) for _ in range(3)]
    assert lengths[0] > 2 and lengths == lengths[:1] * 3


def test_the_vocabulary_is_read_before_there_are_steps(tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llguidance holds the GIL while it reads, so that no step would be computed."""
    grammars = make_grammars(tokenizer_file)
    grammars.prepare()
    monkeypatch.setattr(grammar, "LLTokenizer", None)
    assert compile_one(grammars, "a").advance(A)


def test_a_vocabulary_that_cannot_be_read_is_told_at_the_start(
    tokenizer_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_grammars(tokenizer_file, eos_token_ids=[]).prepare()
    assert "Grammars will be refused: the model has no end-of-sequence token" in caplog.text


def test_one_long_compilation_holds_up_no_other_one(tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = make_grammars(tokenizer_file)
    has_begun, may_end = threading.Event(), threading.Event()
    compile_ = grammars._compile

    def wait(text: str) -> CompiledGrammar:
        if "slow" in text:
            has_begun.set()
            may_end.wait(30)
        return compile_(text)

    monkeypatch.setattr(grammars, "_compile", wait)
    grammars.compile(with_regex("slow", "slow"))
    assert has_begun.wait(30)
    assert compile_one(grammars, "ab").forced() == [A, B]
    may_end.set()


class Echo:
    """A runner for which every next token is the same."""

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id
        self.error: Exception | None = None

    def execute(self, batch: ScheduledBatch) -> StepResult:
        if self.error is not None:
            raise self.error
        logits = torch.zeros(batch.num_rows, VOCAB_SIZE)
        logits[:, self.token_id] = 10.0
        return StepResult(logits, [])


def make_core(grammars: Grammars) -> EngineCore:
    scheduler = Scheduler(BlockManager(16, 4), max_batch_tokens=32, eos_token_ids=EOS_TOKEN_IDS)
    return assemble_core(scheduler, Echo(C), limit=StepLimit(1.0, 5.0), grammars=grammars)


class Peer:
    """The HTTP process' end, while the core serves on a thread."""

    def __init__(self, core: EngineCore) -> None:
        ours, self._sock = socket.socketpair()
        self._buffer = bytearray()
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(core, ours))
        self._thread.start()

    def _serve(self, core: EngineCore, sock: socket.socket) -> None:
        with sock, pytest.raises((EOFError, ZeroDivisionError)):
            core.serve(EngineEndpoint(sock))
        self.ended.set()

    def send(self, message: msgspec.Struct) -> None:
        self._sock.sendall(encode_frame(message))

    def events_until_end(self, *request_ids: str) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        self._sock.settimeout(30)
        while not {*request_ids} <= {event.request_id for event in events if event.is_terminal}:
            self._buffer += self._sock.recv(1 << 16)
            outputs = [output for output in take_frames(self._buffer, decode_up) if isinstance(output, StepOutput)]
            events += [event for output in outputs for event in output.events]
        return events

    def close(self) -> None:
        self._sock.close()
        self._thread.join(30)


@pytest.fixture
def served(tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[EngineCore, Peer]]:
    """A heartbeat would come too late for everything here."""
    monkeypatch.setattr(engine.core, "HEARTBEAT_S", 20.0)
    grammars = make_grammars(tokenizer_file)
    compile_one(grammars, "warm")
    core = make_core(grammars)
    peer = Peer(core)
    yield core, peer
    peer.close()


def tokens_of(events: list[TokenEvent], request_id: str) -> list[int]:
    return [token_id for event in events if event.request_id == request_id for token_id in event.token_ids]


def test_an_idle_engine_notices_the_end_of_a_compilation(served: tuple[EngineCore, Peer]) -> None:
    _, peer = served
    started = time.monotonic()
    peer.send(with_regex("a", "[bc]{3}", is_ignoring_eos=True, sampling=SamplingParams()))
    events = peer.events_until_end("a")
    assert time.monotonic() - started < 5.0
    assert tokens_of(events, "a")[:-1] == [C, C, C]
    assert tokens_of(events, "a")[-1] in EOS_TOKEN_IDS
    assert events[-1].finish_reason is FinishReason.EOS_TOKEN


def test_what_is_no_grammar_ends_its_request_with_one_error(served: tuple[EngineCore, Peer]) -> None:
    core, peer = served
    peer.send(with_regex("bad", "("))
    peer.send(with_regex("good", "c"))
    events = peer.events_until_end("bad", "good")
    (error,) = [event for event in events if event.request_id == "bad"]
    assert error.error is not None and error.error.startswith("the grammar cannot be compiled: ")
    assert tokens_of(events, "good")[0] == C
    assert not core.scheduler.has_work


def slow_compilation(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Compilations now say that they have begun, and wait to be let go."""
    has_begun, may_end = threading.Event(), threading.Event()
    compile_ = core.grammars._compile

    def wait(text: str) -> CompiledGrammar:
        has_begun.set()
        may_end.wait(30)
        return compile_(text)

    monkeypatch.setattr(core.grammars, "_compile", wait)
    return has_begun, may_end


def test_others_go_on_while_a_grammar_is_compiled_and_aborts_count(
    served: tuple[EngineCore, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, peer = served
    has_begun, may_end = slow_compilation(core, monkeypatch)
    peer.send(with_regex("slow", "c"))
    assert has_begun.wait(30)
    peer.send(with_regex("behind it", "c"))
    peer.send(with_regex("aborted, too", "c"))
    peer.send(make_request("plain", [1, 2], max_new_tokens=3))
    assert tokens_of(peer.events_until_end("plain"), "plain") == [C, C, C]
    peer.send(AbortRequest("slow"))
    peer.send(AbortRequest("aborted, too"))
    peer.send(make_request("later", [1, 2], max_new_tokens=1))
    peer.events_until_end("later")  # so the aborts have been taken in
    may_end.set()
    events = peer.events_until_end("behind it")
    assert {event.request_id for event in events} == {"behind it"}
    assert not core.scheduler.has_work


def test_a_failing_step_ends_requests_whose_grammars_are_not_ready(
    served: tuple[EngineCore, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, peer = served
    has_begun, may_end = slow_compilation(core, monkeypatch)
    peer.send(with_regex("slow", "c"))
    assert has_begun.wait(30)
    monkeypatch.setattr(core.runner, "error", ZeroDivisionError("broken"))
    peer.send(make_request("plain", [1, 2], max_new_tokens=3))
    errors = {event.request_id: event.error for event in peer.events_until_end("plain", "slow")}
    may_end.set()
    assert errors == {"plain": "broken", "slow": "broken"}
    assert peer.ended.wait(30)


@pytest.mark.parametrize(
    ("content", "eos_token_ids", "error"),
    [
        (None, EOS_TOKEN_IDS, "tokenizer.json cannot be used for grammars: "),
        ("{}", EOS_TOKEN_IDS, "tokenizer.json cannot be used for grammars: "),
        ("{}", [], "the model has no end-of-sequence token, so no grammar could end"),
    ],
)
def test_a_model_that_cannot_have_grammars_says_so(
    tmp_path: Path, content: str | None, eos_token_ids: list[int], error: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    grammars = make_grammars(tmp_path / "tokenizer.json", eos_token_ids)
    is_compiled = threading.Event()
    grammars.on_compiled = is_compiled.set
    grammars.compile(with_regex("a", "c"))
    assert is_compiled.wait(30)
    (compiled,) = grammars.take_compiled()
    assert compiled.error is not None and compiled.error.startswith(error)
