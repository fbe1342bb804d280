"""Bodies that are large or hostile: what they may hold, and that they cost next to nothing."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from server.app import create_app
from server.errors import BodyError
from server.requests.body import BodyReader
from server.requests.native import DetokenizeRequest, GenerateRequest
from server.requests.openai import ChatRequest, CompletionRequest
from server.requests.responses import ResponsesRequest, chat_of
from server.requests.structure import CHUNK_BYTES, DEFAULT_LIMITS, StructureLimits, check_structure
from server.text.tokenizer import TextTokenizer
from tests.e2e.attacks import BODIES
from tests.unit.server.harness import FakeEngine, client_of, make_config

MAX_MILLIONS = 10
"""What the costliest bodies of two megabytes may take of the thread that reads, in millions of additions of integers.

Both grow with the load of the machine: 3 of them on a quiet one.
"""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('",:[]{}\\\n a') | st.floats(allow_nan=False),
    lambda items: st.lists(items) | st.dictionaries(st.text('",:[]{}\\'), items),
    max_leaves=20,
)


def depth_of(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def addition_s() -> float:
    """Seconds of this thread that an addition takes now, in Python."""
    started, total, count = time.thread_time(), 0, 200_000
    for number in range(count):
        total += number
    return (time.thread_time() - started) / count


def containers_of(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    return 1 + sum(map(containers_of, value.values() if isinstance(value, dict) else value))


@given(VALUES, st.booleans())
def test_what_is_counted_is_there(value: Any, is_ascii: bool) -> None:
    structure = check_structure(json.dumps(value, ensure_ascii=is_ascii).encode(), DEFAULT_LIMITS)
    assert (structure.depth, structure.num_containers) == (depth_of(value), containers_of(value))


@pytest.mark.parametrize("escapes", [b"\\\\", b'\\"', b'\\\\\\"', b"x\\n"])
@pytest.mark.parametrize("offset", range(4))
def test_a_string_over_the_border_of_two_chunks_is_a_string(escapes: bytes, offset: int) -> None:
    text = b'["' + b"x" * offset + escapes * CHUNK_BYTES + b'[[[",[]]'
    assert check_structure(text, DEFAULT_LIMITS).num_containers == 2


LIMITS = StructureLimits(max_values=9, max_keys=3, max_containers=5, max_digits=4)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("[1,2,3,4,5,6,7,8,9]", None),
        ("[1,2,3,4,5,6,7,8,9,10]", "more than 9 values"),
        ('[",,,,,,,,,,,,,,,,,"]', None),
        ('{"a":1,"b":2,"c":3}', None),
        ('{"a":1,"b":2,"c":3,"c":3}', "more than 3 keys"),
        ("[[[[[]]]]]", None),
        ("[[[[[[", "more than 5 lists and objects"),
        ("[1234,0.1234e1234]", None),
        ("[12345]", "a number of more than 4 digits"),
        ('"12345"', None),
        ("{" + "," * 10, "more than 9 values"),
    ],
)
def test_too_much_of_anything_is_refused(text: str, refused: str | None) -> None:
    if refused is None:
        check_structure(text.encode(), LIMITS)
    else:
        with pytest.raises(BodyError, match=refused):
            check_structure(text.encode(), LIMITS)


def test_a_long_number_is_found_where_two_chunks_meet() -> None:
    text = b"[" + b" " * (CHUNK_BYTES - 3) + b"12345" + b" " * CHUNK_BYTES + b"]"
    with pytest.raises(BodyError, match="more than 4 digits"):
        check_structure(text, LIMITS)


USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
HONEST: list[tuple[type[Any], Any]] = [
    (GenerateRequest, {"inputs": "hello wide world " * 60_000}),
    (GenerateRequest, {"inputs": "x", "parameters": {"logit_bias": {str(index): 1 for index in range(300)}}}),
    (ChatRequest, {"messages": [USER] * 10_000}),
    (ChatRequest, {"messages": [USER | {"content": [{"type": "text", "text": "a"}]}] * 10_000}),
    (ChatRequest, {"messages": [USER], "tools": [TOOL] * 128}),
    (CompletionRequest, {"prompt": [[5] * 131_072] * 4}),
    (DetokenizeRequest, {"tokens": [151_000] * 131_072}),
]


@pytest.mark.parametrize(("model", "body"), HONEST)
async def test_large_honest_bodies_are_read(model: type[Any], body: Any) -> None:
    reader = BodyReader(is_strict=False)
    measured = await reader.measure(json.dumps(body).encode())
    read = await reader.read(measured, model)
    reader.close()
    assert isinstance(read, model)


MODELS: dict[str, type[Any]] = {
    "/generate": GenerateRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/detokenize": DetokenizeRequest,
}


@pytest.mark.parametrize("name", [name for name, (path, _) in BODIES.items() if path in MODELS])
def test_hostile_bodies_cost_little(name: str) -> None:
    """A thread's own time, in that of something whose cost is known; without garbage of the tests before."""
    path, make = BODIES[name]
    body = make()
    data = body if isinstance(body, bytes) else body.encode()
    spent: list[float] = []

    def read() -> None:
        reader = BodyReader(is_strict=False)
        gc.disable()
        started = time.thread_time()
        try:
            reader._read(reader._measure(data), MODELS[path])
        except BodyError as error:
            assert len(str(error)) < 3_000
        finally:
            gc.enable()
        spent.append((time.thread_time() - started) / addition_s())
        reader.close()

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert spent[0] < MAX_MILLIONS * 1_000_000


async def test_the_loop_goes_on_while_a_large_body_is_read(client: httpx.AsyncClient, app: FastAPI) -> None:
    reader = BodyReader(is_strict=False)
    measured = await reader.measure(json.dumps({"messages": [USER] * 10_000}).encode())
    thread = threading.current_thread()
    threads: list[threading.Thread] = []
    read: Callable[..., Any] = reader._read

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return read(*args)

    reader._read = noted  # type: ignore[method-assign]
    await reader.read(measured, ChatRequest)
    await reader.read(await reader.measure(b'{"messages":[]}'), ChatRequest)
    reader.close()
    assert threads[0] is not thread and threads[1] is thread


async def test_a_large_body_becomes_a_chat_where_it_is_read() -> None:
    reader = BodyReader(is_strict=False)
    measured = await reader.measure(json.dumps({"input": [USER] * 10_000}).encode())
    threads: list[threading.Thread] = []

    def convert(body: ResponsesRequest) -> ChatRequest:
        threads.append(threading.current_thread())
        return chat_of(body)

    chat = await reader.read_into(measured, ResponsesRequest, convert)
    reader.close()
    assert len(chat.messages) == 10_000 and threads[0] is not threading.current_thread()


def list_error(body: Any) -> str:
    """What is said of `body`, without the place."""
    reader = BodyReader(is_strict=False)
    try:
        reader._read(reader._measure(json.dumps(body).encode()), ChatRequest)
    except BodyError as error:
        return str(error).partition("target type: ")[2].partition(" at line")[0]
    finally:
        reader.close()
    raise AssertionError("it is accepted")


def test_the_first_wrong_item_ends_the_reading() -> None:
    assert (
        list_error({"messages": [5, {"role": "user"}]})
        == "messages[0]: invalid type: integer `5`, expected struct Message"
    )
    assert list_error({"messages": [USER, {"role": "user"}, 5]}) == "messages[1]: missing field `content`"


def test_lists_have_lengths_of_their_own() -> None:
    assert list_error({"messages": [0] * 16_385}) == "messages: invalid length 16385, expected at most 16384 items"
    tools = {"messages": [], "tools": [0] * 1_025}
    assert list_error(tools) == "tools: invalid length 1025, expected at most 1024 items"


def test_a_long_text_is_not_sent_back_whole() -> None:
    reason = list_error({"messages": [], "max_tokens": "x" * 100_000})
    assert reason == f'max_tokens: invalid type: string "{"x" * 1000}...", expected u32'


def test_large_ids_are_never_put_in_a_map() -> None:
    """Multiples of a Mersenne prime have equal hashes: a map of 70,000 takes a minute."""
    bias = {str((2**61 - 1) * index): 1 for index in range(1, 3)}
    assert "expected a token id" in list_error({"messages": [], "logit_bias": bias})


async def test_more_biases_than_allowed_are_refused(engine: FakeEngine, model_folder: Any) -> None:
    tokenizer = TextTokenizer.from_folder(str(model_folder), 1)
    async with client_of(create_app(engine, make_config(max_logit_bias=2), tokenizer)) as client:
        for number, status in ((2, 200), (3, 422)):
            bias = {str(index): 1 for index in range(number)}
            response = await client.post("/generate", json={"inputs": "x", "parameters": {"logit_bias": bias}})
            assert response.status_code == status
        assert response.json()["error"] == "Input validation error: `logit_bias` supports up to 2 tokens. Given: 3"
