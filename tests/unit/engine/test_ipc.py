"""Frames, and the engine's end of the socket pair with a peer that is slow, gone, or writes byte by byte."""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.link import ipc
from engine.link.ipc import (
    HEADER,
    MAX_RECEIVED_BYTES,
    EngineEndpoint,
    decode_down,
    decode_up,
    encode_frame,
    take_frames,
)
from engine.link.messages import (
    AbortRequest,
    Down,
    EngineReady,
    EngineStarting,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Goodbye,
    SamplingParams,
    StepOutput,
    StepReport,
    TokenEvent,
    Up,
)
from engine.link.progress import Stage

READY = EngineReady(
    max_input_tokens=1, max_total_tokens=2, max_batch_prefill_tokens=3, max_batch_total_tokens=4, vocab_size=5
)
MESSAGES: list[Down] = [
    GenerationRequest(request_id="a", prompt_token_ids=[1, 151_935], max_new_tokens=3),
    AbortRequest("a"),
    GenerationRequest(
        request_id="ü" * 300,
        prompt_token_ids=list(range(300)),
        max_new_tokens=1,
        sampling=SamplingParams(seed=2**64 - 1, temperature=0.5, top_k=3, top_p=0.25),
    ),
]


@pytest.fixture
def pair() -> Iterator[tuple[EngineEndpoint, socket.socket]]:
    """The engine's end, and the other one as a plain socket; little is buffered in between."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with ours, theirs:
        yield EngineEndpoint(ours), theirs


def step_output(*events: TokenEvent, num_running: int = 0) -> StepOutput:
    reports = [StepReport(num_sequences=len(events))] if events else []
    return StepOutput(events=list(events), stats=EngineStats(num_running=num_running), reports=reports)


def read_all(sock: socket.socket, buffer: bytearray) -> list[Up]:
    """The messages that can be read without waiting."""
    while select.select([sock], [], [], 0)[0]:
        buffer += sock.recv(1 << 16)
    return take_frames(buffer, decode_up)


def drain(endpoint: EngineEndpoint, peer: socket.socket, buffer: bytearray) -> list[Up]:
    """The messages that come while the reader catches up and the engine is idle."""
    received = read_all(peer, buffer)
    for _ in range(10_000):
        if not endpoint._outbox:
            return received + read_all(peer, buffer)
        endpoint.receive(0.01)
        received += read_all(peer, buffer)
    raise AssertionError("what is pending is never written")


def test_reports_of_the_start_wait_for_nobody_and_what_is_said_last_comes_whole(
    pair: tuple[EngineEndpoint, socket.socket],
) -> None:
    endpoint, peer = pair
    reports = [EngineStarting(stage=Stage.LOADING, done=number / 1000, text="x" * 50) for number in range(1000)]
    for report in reports:
        endpoint.send(report)
    endpoint.send(READY)
    received = drain(endpoint, peer, bytearray())
    assert received[-1] == READY
    assert 1 < len(received) < 1000, "most of them found no room"
    assert received[:-1] == reports[: len(received) - 1]


def test_a_frame_is_a_big_endian_length_and_a_body() -> None:
    frame = encode_frame(AbortRequest("a"))
    assert HEADER.unpack(frame[:4]) == (len(frame) - 4,)
    assert decode_down(frame[4:]) == AbortRequest("a")


@given(st.lists(st.integers(0, 400), max_size=8))
def test_frames_split_anywhere_come_out_whole_and_in_order(cuts: list[int]) -> None:
    stream = b"".join(map(encode_frame, MESSAGES))
    edges = [0, *sorted(cut % len(stream) for cut in cuts), len(stream)]
    buffer = bytearray()
    received: list[Down] = []
    for start, end in zip(edges, edges[1:], strict=False):
        buffer += stream[start:end]
        received += take_frames(buffer, decode_down)
    assert received == MESSAGES
    assert not buffer


def test_every_single_cut() -> None:
    stream = b"".join(map(encode_frame, MESSAGES[:2]))
    for cut in range(len(stream) + 1):
        buffer = bytearray(stream[:cut])
        first = take_frames(buffer, decode_down)
        buffer += stream[cut:]
        assert first + take_frames(buffer, decode_down) == MESSAGES[:2]


@pytest.mark.parametrize(
    "message",
    [
        READY,
        step_output(),
        step_output(
            TokenEvent(request_id="a", token_ids=[1], logprobs=[-0.5], queue_time_s=0.0),
            TokenEvent(request_id="b", finish_reason=FinishReason.EOS_TOKEN),
            TokenEvent(request_id="c", error="no"),
        ),
    ],
)
def test_messages_to_the_server_survive_the_wire(message: EngineReady | StepOutput) -> None:
    assert take_frames(bytearray(encode_frame(message)), decode_up) == [message]


def test_receive_returns_what_has_arrived(pair: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = pair
    assert endpoint.receive(0.0) == []
    stream = b"".join(map(encode_frame, MESSAGES))
    peer.sendall(stream[:-3])
    assert endpoint.receive(1.0) == MESSAGES[:2]
    peer.sendall(stream[-3:])
    assert endpoint.receive(1.0) == MESSAGES[2:]


def test_a_large_request_arrives_whole(pair: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = pair
    request = GenerationRequest(request_id="a", prompt_token_ids=[150_000] * 50_000, max_new_tokens=1)
    frame = memoryview(encode_frame(request))
    peer.setblocking(False)
    received: list[Down] = []
    while not received:
        if frame and select.select([], [peer], [], 0)[1]:
            frame = frame[peer.send(frame) :]
        received += endpoint.receive(0.0)
    assert received == [request]


def test_a_reader_that_keeps_up_gets_every_step(pair: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = pair
    buffer = bytearray()
    endpoint.send(READY)
    assert read_all(peer, buffer) == [READY]
    for number in range(20):
        output = step_output(TokenEvent(request_id="a", token_ids=[number], logprobs=[0.0]), num_running=number)
        endpoint.send(output)
        assert read_all(peer, buffer) == [output]


def test_a_lagging_reader_gets_merged_tokens_and_loses_nothing(pair: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = pair
    chance = random.Random(0)
    names = [f"request-{number}" for number in range(5)]
    num_steps = 3000
    received: list[Up] = []
    buffer = bytearray()
    most_held = 0
    endpoint.send(READY)
    for step in range(num_steps):
        is_last = step == num_steps - 1
        reason = FinishReason.LENGTH if is_last else None
        events = [
            TokenEvent(
                request_id=name,
                token_ids=[step],
                logprobs=[-float(step)],
                finish_reason=reason,
                queue_time_s=0.25 if step == 0 else None,
            )
            for name in names
        ]
        endpoint.send(step_output(*events, num_running=step))
        most_held = max(most_held, len(endpoint._lagging))
        if chance.random() < 0.002:
            received += read_all(peer, buffer)
    received += drain(endpoint, peer, buffer)
    assert received[0] == READY
    outputs = [output for output in received[1:] if isinstance(output, StepOutput)]
    assert len(outputs) < num_steps / 2, "the reader did not lag: the test shows nothing"
    assert most_held == len(names)
    assert outputs[-1].stats.num_running == num_steps - 1
    assert [report.num_sequences for output in outputs for report in output.reports] == [len(names)] * num_steps
    for name in names:
        events = [event for output in outputs for event in output.events if event.request_id == name]
        assert [token for event in events for token in event.token_ids] == list(range(num_steps))
        assert [logprob for event in events for logprob in event.logprobs] == [-float(n) for n in range(num_steps)]
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [FinishReason.LENGTH]
        assert [event.queue_time_s for event in events] == [0.25] + [None] * (len(events) - 1)


def test_what_is_pending_for_a_dead_reader_is_bounded(pair: tuple[EngineEndpoint, socket.socket]) -> None:
    """Heartbeats replace one another: nothing grows while nobody reads and nothing is generated."""
    endpoint, _ = pair
    while not endpoint._outbox:
        endpoint.send(step_output(TokenEvent(request_id="a", token_ids=[1], logprobs=[0.0])))
    endpoint.send(step_output(num_running=1))
    size = len(endpoint._outbox)
    for number in range(1000):
        endpoint.send(step_output(num_running=number))
    assert len(endpoint._outbox) == size
    assert not endpoint._lagging


def test_an_error_of_a_lagging_request_is_kept(pair: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = pair
    while not endpoint._outbox:
        endpoint.send(step_output(TokenEvent(request_id="other", token_ids=[1] * 100, logprobs=[0.0] * 100)))
    endpoint.send(step_output(TokenEvent(request_id="a", token_ids=[1], logprobs=[0.0])))
    endpoint.send(step_output(TokenEvent(request_id="a", error="no")))
    last = drain(endpoint, peer, bytearray())[-1]
    assert isinstance(last, StepOutput)
    assert last.events == [TokenEvent(request_id="a", token_ids=[1], logprobs=[0.0], error="no")]


def test_the_peers_end_raises_on_receive(pair: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = pair
    peer.close()
    with pytest.raises(EOFError, match="the HTTP process closed its socket"):
        endpoint.receive(1.0)


@pytest.mark.parametrize("is_sending", [False, True])
def test_what_the_peer_said_last_is_received_before_its_end(
    pair: tuple[EngineEndpoint, socket.socket], is_sending: bool
) -> None:
    endpoint, peer = pair
    peer.sendall(encode_frame(Goodbye()))
    peer.close()
    if is_sending:
        endpoint.send(step_output())
    assert endpoint.receive(1.0) == [Goodbye()]
    for _ in range(2):
        with pytest.raises(EOFError, match="the HTTP process closed its socket"):
            endpoint.receive(1.0)


def test_a_process_ends_with_its_lifeline() -> None:
    script = (
        "import sys, time, engine.link.ipc as ipc; ipc.exit_when_closed(0, lambda text: print(text)); time.sleep(60)"
    )
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("a line is not the end\n")
        process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.stdin.close()
        assert process.wait(20) == 1
        assert process.stdout.read() == "the launcher is gone: exiting\n"


def test_much_that_comes_at_once_is_taken_in_over_several_calls() -> None:
    """The steps of others go on between them; nothing is lost, also where the peer is gone meanwhile."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(True)
    request = GenerationRequest(
        request_id="a" * 32,
        prompt_token_ids=[1],
        max_new_tokens=1,
        sampling=SamplingParams(logit_bias=dict.fromkeys(range(40_000), 1.0)),
    )
    frame = encode_frame(request)
    with ours:
        endpoint = EngineEndpoint(ours)
        with theirs, ThreadPoolExecutor(1) as pool:
            sending = pool.submit(theirs.sendall, frame * 40)
            calls = [len(endpoint.receive(1.0))]
            while sum(calls) < 40:
                calls.append(len(endpoint.receive(1.0)))
            sending.result()
        assert max(calls) <= MAX_RECEIVED_BYTES // len(frame) + 1
        with pytest.raises(EOFError):
            endpoint.receive(1.0)


def test_a_frame_beyond_the_sockets_buffer_is_taken_in_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that follow a large one do not wait for a step for each 200 KB of it."""
    monkeypatch.setattr(ipc, "MAX_FRAME_WAIT_S", 10.0)  # a busy machine may not let the sender run for a while
    ours, theirs = socket.socketpair()
    frame = encode_frame(GenerationRequest(request_id="a", prompt_token_ids=[70_000] * 300_000, max_new_tokens=1))
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        endpoint = EngineEndpoint(ours)
        sending = pool.submit(theirs.sendall, frame)
        assert len(endpoint.receive(1.0)) == 1
        sending.result()
    assert len(frame) > 1_000_000


def test_the_rest_of_a_frame_is_not_waited_for_long(pair: tuple[EngineEndpoint, socket.socket]) -> None:
    endpoint, peer = pair
    frame = encode_frame(MESSAGES[0])
    peer.sendall(frame + frame[:-1])
    started = time.monotonic()
    assert endpoint.receive(1.0) == MESSAGES[:1]
    assert time.monotonic() - started < 0.5
    peer.sendall(frame[-1:])
    assert endpoint.receive(1.0) == MESSAGES[:1]
