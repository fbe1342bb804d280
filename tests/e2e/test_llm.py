"""The Python API on a tiny model: answers, batches, refusals, and calls that are broken off."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pytgi import LLM, RequestError, ServerDiedError, StartError
from pytgi.wire import Calls

PROMPTS = [f"prompt number {index}" for index in range(40)]
CHAT = [{"role": "user", "content": "Hello"}]
LONG = 450
"""New tokens that take the tiny model a while."""


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, dtype="float32") as llm:
        yield llm


def running_requests(llm: LLM) -> float:
    """Sequences that the engine runs or that wait for it."""
    lines = Calls().get(llm._server.path, "/metrics").decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return float(values["tgi_batch_current_size"]) + float(values["tgi_queue_size"])


def wait_until_idle(llm: LLM) -> None:
    deadline = time.monotonic() + 10
    while running_requests(llm):
        assert time.monotonic() < deadline, "the engine still works for nobody"
        time.sleep(0.05)


def test_a_batch_has_the_texts_of_its_prompts_in_order(llm: LLM) -> None:
    alone = [llm.generate(prompt, max_new_tokens=8) for prompt in PROMPTS[:5]]
    batch = llm.generate(PROMPTS, max_new_tokens=8)
    assert [result.text for result in batch[:5]] == [result.text for result in alone]
    assert {result.num_tokens for result in batch} == {8} and len({result.text for result in batch}) > 5
    assert (alone[0].finish_reason, alone[0].tokens[0].text) == (
        "length",
        alone[0].body["details"]["tokens"][0]["text"],
    )
    assert llm.generate([]) == []


def test_a_stream_has_the_tokens_of_the_text(llm: LLM) -> None:
    tokens = list(llm.stream("Hello", max_new_tokens=6, seed=1))
    assert tokens[-1].body["generated_text"] == llm.generate("Hello", max_new_tokens=6, seed=1).text
    assert [token.body["index"] for token in tokens] == [1, 2, 3, 4, 5, 6]


def test_a_chat_and_a_batch_of_chats(llm: LLM) -> None:
    result = llm.chat(CHAT, max_tokens=6, temperature=0)
    assert (result.num_tokens, result.finish_reason, result.tool_calls) == (6, "length", [])
    assert [other.text for other in llm.chat([CHAT, CHAT], max_tokens=6, temperature=0)] == [result.text] * 2
    pieces = list(llm.stream_chat(CHAT, max_tokens=6, temperature=0))
    assert "".join(piece.text for piece in pieces) == result.text
    assert pieces[-1].finish_reason == "length"


def test_structured_output_and_choices_come_through(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    text = llm.generate("x", grammar={"type": "json", "value": schema}, max_new_tokens=60).text
    assert json.loads(text) == {"a": 1}
    assert len(llm.chat(CHAT, n=3, max_tokens=2).body["choices"]) == 3
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    [call] = llm.chat(CHAT, tools=tools, tool_choice="required", max_tokens=100).tool_calls
    assert call["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        (lambda llm: llm.generate("x", temperature=-1.0), 422, "`temperature` must be strictly positive"),
        (lambda llm: llm.generate([*PROMPTS, "word " * 600], max_new_tokens=4), 422, "must be <= 512"),
        (lambda llm: llm.generate("x", seed="many"), 422, 'invalid type: string "many"'),
        (lambda llm: llm.generate("x", best_of="3"), 422, 'invalid type: string "3"'),
        (lambda llm: llm.chat(CHAT, temperature=-1.0), 400, "`temperature` must be"),
        (lambda llm: list(llm.stream("x", top_p=3.0)), 200, "`top_p` must be"),
        (lambda llm: list(llm.stream_chat(CHAT, top_p=3.0)), 400, "`top_p` must be"),
    ],
)
def test_the_refusals_of_the_wire_are_exceptions(
    llm: LLM, call: Callable[[LLM], object], status: int, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        call(llm)
    assert raised.value.status == status


def test_a_refused_request_ends_its_batch(llm: LLM) -> None:
    with pytest.raises(RequestError, match="must be <= 512"):
        llm.generate(["word " * 600, *PROMPTS], max_new_tokens=LONG)
    wait_until_idle(llm)


def test_leaving_a_stream_ends_it(llm: LLM) -> None:
    for _ in llm.stream("Hello", max_new_tokens=LONG, ignore_eos=True):
        break
    wait_until_idle(llm)


def test_a_stream_that_is_kept_can_be_closed(llm: LLM) -> None:
    streams = [
        llm.stream("Hello", max_new_tokens=LONG, ignore_eos=True),
        llm.stream_chat(CHAT, max_tokens=LONG, ignore_eos=True),
    ]
    for stream in streams:
        next(stream)
        stream.close()
        assert list(stream) == []
    wait_until_idle(llm)


def test_ctrl_c_breaks_a_batch_off_and_leaves_the_server_alone(llm: LLM) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS * 8, max_new_tokens=LONG, ignore_eos=True)
    timer.join()
    wait_until_idle(llm)
    assert llm.generate("Hello", max_new_tokens=2).num_tokens == 2


def test_a_forked_process_may_not_use_it_and_does_not_end_it(llm: LLM) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            llm.generate("Hello")
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        llm.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert b"belongs to the process that this one was forked from" in os.read(reader, 1000)
    os.close(reader)
    os.close(writer)
    assert llm.generate("Hello", max_new_tokens=2).num_tokens == 2


def test_what_the_server_says_while_it_starts_is_the_exceptions_text(tmp_path: Path) -> None:
    words = r"^unrecognized arguments: --max-total-tokenz=3 \(did you mean --max-total-tokens\?\)$"
    with pytest.raises(StartError, match=words):
        LLM(tmp_path, max_total_tokenz=3)


def test_a_server_that_dies_is_an_exception_with_the_cause(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """The last test with this server."""
    [launcher] = [process for process in psutil.Process().children() if "server.launcher.embedded" in process.cmdline()]
    [engine] = [process for process in launcher.children() if process.cmdline()[-1] == "engine"]
    stream = llm.stream("Hello", max_new_tokens=LONG, ignore_eos=True)
    next(stream)
    engine.kill()
    with caplog.at_level(logging.ERROR, "pytgi"), pytest.raises(ServerDiedError, match="engine rank 0 was killed by"):
        list(stream)
    assert "strictly positive" not in caplog.text  # refusals are no cause
    with pytest.raises(ServerDiedError, match="engine rank 0 was killed by SIGKILL"):
        llm.generate("Hello")
    llm.close()
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate("Hello")
