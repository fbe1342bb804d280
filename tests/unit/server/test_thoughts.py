"""Answers of reasoning models: thoughts stand beside the words, streamed or not, and calls count after them only."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.link.messages import FinishReason
from server.app import create_app
from server.chat.rendering import Ending
from server.chat.thoughts import AUTO, PARSERS, ChatReader, Thinking, default_thinking, thinking_after
from server.chat.tool_calls import FreeCallReader
from server.launcher.flags import every_flag
from server.requests.messages import Message
from server.text.pieces import Arguments, CallStart, Content, Piece, Thought
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import (
    CHATML,
    FakeEngine,
    client_of,
    events_of,
    make_config,
    one_by_one,
    write_model_folder,
)

THINKING_CHATML = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
"""A template that begins the thought itself, as QwQ's does."""
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def read(text: str, size: int, thinking: Thinking, *, is_cut: bool = False) -> tuple[str, str, list[str]]:
    """The thought, the words and the calls of an answer that comes in parts of `size` characters."""
    reader = FreeCallReader(["f"], thinking=thinking)
    pieces: list[Piece] = []
    for start in range(0, len(text), size):
        pieces += reader.push(text[start : start + size])
    pieces += reader.finish(is_cut=is_cut)
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    words = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    calls = [piece.name for piece in pieces if isinstance(piece, CallStart)]
    assert reader.num_calls == len(calls)
    assert all(piece.text for piece in pieces if not isinstance(piece, CallStart | Arguments))
    return thought, words, calls


ANSWERS: list[tuple[str, Thinking, tuple[str, str, list[str]]]] = [
    ("<think>\nHm.\n\nSo.\n</think>\n\nFour.\n", Thinking.MAY_BEGIN, ("Hm.\n\nSo.", "Four.\n", [])),
    ("Hm.\n</think>\n\n  Four.", Thinking.HAS_BEGUN, ("Hm.", "Four.", [])),
    ("\n<think>\nHm.</think>Four.", Thinking.HAS_BEGUN, ("Hm.", "Four.", [])),
    ("<think>\n\n</think>\n\nFour.", Thinking.MAY_BEGIN, ("", "Four.", [])),
    ("</think>Four.", Thinking.HAS_BEGUN, ("", "Four.", [])),
    ("Four.", Thinking.MAY_BEGIN, ("", "Four.", [])),
    ("  <th> <think>a</think>", Thinking.MAY_BEGIN, ("", "  <th> <think>a</think>", [])),
    ("<think>a </thin> b</think>c</think>d", Thinking.MAY_BEGIN, ("a </thin> b", "c</think>d", [])),
    ("Hm. I have", Thinking.HAS_BEGUN, ("Hm. I have", "", [])),
    ("<think>Hm.\n</thi", Thinking.MAY_BEGIN, ("Hm.\n</thi", "", [])),
    ("<thi", Thinking.MAY_BEGIN, ("", "<thi", [])),
    ("<think>", Thinking.MAY_BEGIN, ("", "", [])),
    ("", Thinking.HAS_BEGUN, ("", "", [])),
    (f"<think>maybe {CALL}</think>{CALL}", Thinking.MAY_BEGIN, (f"maybe {CALL}", "", ["f"])),
    (f"maybe {CALL}\n</think>\n\nWell. {CALL}", Thinking.HAS_BEGUN, (f"maybe {CALL}", "Well.", ["f"])),
    (f"maybe {CALL}", Thinking.HAS_BEGUN, (f"maybe {CALL}", "", [])),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("text", "thinking", "expected"), ANSWERS)
def test_thoughts_however_the_text_is_cut(
    text: str, thinking: Thinking, expected: tuple[str, str, list[str]], size: int
) -> None:
    assert read(text, size, thinking) == expected


def test_words_after_a_thought_come_as_they_are_written() -> None:
    reader = ChatReader(thinking=Thinking.MAY_BEGIN)
    parts = ["<th", "ink>", "\n", "Hm", ".", "</", "think>", "\n\n", "Fo", "ur. "]
    pieces = [reader.push(part) for part in parts]
    assert pieces == [[], [], [], [Thought("Hm")], [Thought(".")], [], [], [], [Content("Fo")], [Content("ur. ")]]


@pytest.mark.parametrize(
    ("prompt", "last", "ending", "default", "expected"),
    [
        ("assistant\n<think>\n", "user", Ending.AUTOMATIC, Thinking.MAY_BEGIN, Thinking.HAS_BEGUN),
        ("assistant\n", "user", Ending.AUTOMATIC, Thinking.MAY_BEGIN, Thinking.MAY_BEGIN),
        ("assistant\n", "user", Ending.NEW, Thinking.HAS_BEGUN, Thinking.HAS_BEGUN),
        ("<think>\n\n</think>\n\n", "user", Ending.AUTOMATIC, Thinking.HAS_BEGUN, Thinking.NONE),
        ("assistant\n<think>\n", "user", Ending.AUTOMATIC, Thinking.NONE, Thinking.IS_CONTENT),
        ("...", "The tag <think> begins", Ending.AUTOMATIC, Thinking.NONE, Thinking.NONE),
        ("...", "<think>a</think>b", Ending.AUTOMATIC, Thinking.HAS_BEGUN, Thinking.NONE),
        ("...", "<think>\nOkay, ", Ending.CONTINUED, Thinking.MAY_BEGIN, Thinking.HAS_BEGUN),
        ("assistant\n", "", Ending.CONTINUED, Thinking.MAY_BEGIN, Thinking.MAY_BEGIN),
        ("assistant\n<think>", "<think>", Ending.NEW, Thinking.MAY_BEGIN, Thinking.HAS_BEGUN),
    ],
)
def test_what_an_answer_begins_with(
    prompt: str, last: str, ending: Ending, default: Thinking, expected: Thinking
) -> None:
    role, content = ("user", "?") if last == "user" else ("assistant", last)
    message = Message.model_validate({"role": role, "content": content}, context={"is_strict": False})
    assert thinking_after(prompt, [message], ending, default) is expected


def test_words_of_a_question_begin_no_thought() -> None:
    message = Message.model_validate({"role": "user", "content": "Say <think>"}, context={"is_strict": False})
    thinking = thinking_after("Say <think><|im_end|>\n", [message], Ending.AUTOMATIC, Thinking.MAY_BEGIN)
    assert thinking is Thinking.MAY_BEGIN


def test_every_parser_is_a_value_of_the_flag() -> None:
    (flag,) = (flag for flag in every_flag() if flag.name == "reasoning-parser")
    assert sorted(flag.choices or ()) == sorted([AUTO, *PARSERS])


def load(folder: Path, template: str, *marks: str) -> TextTokenizer:
    write_model_folder(folder, template)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    first = max(content["model"]["vocab"].values()) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [{"id": first + i, "content": mark} | flags for i, mark in enumerate(marks)]
    path.write_text(json.dumps(content))
    return TextTokenizer.from_folder(str(folder), 1)


@pytest.mark.parametrize(
    ("template", "marks", "expected"),
    [
        (CHATML, (), Thinking.NONE),
        (CHATML, ("<think>", "</think>"), Thinking.MAY_BEGIN),
        (THINKING_CHATML, (), Thinking.MAY_BEGIN),
        ("{{ content.split('</think>')[-1] }}", (), Thinking.MAY_BEGIN),
    ],
)
def test_auto_looks_whether_the_model_knows_thoughts(
    template: str, marks: tuple[str, ...], expected: Thinking, tmp_path: Path
) -> None:
    tokenizer = load(tmp_path, template, *marks)
    assert default_thinking(AUTO, tokenizer) is expected
    assert default_thinking("off", tokenizer) is Thinking.NONE
    assert default_thinking("deepseek_r1", tokenizer) is Thinking.HAS_BEGUN


@pytest.fixture(params=[(), ("<think>", "</think>")], ids=["marks are text", "marks are tokens"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    return load(tmp_path, THINKING_CHATML, *request.param)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


Says = Callable[[str], None]


@pytest.fixture
def says(engine: FakeEngine, model: TextTokenizer) -> Says:
    def say(text: str) -> None:
        engine.script.events = one_by_one(model._encode(text + "<|im_end|>", False))

    return say


@pytest.fixture
async def http(engine: FakeEngine, model: TextTokenizer) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(engine, make_config(), model)) as client:
        yield client


USER = [{"role": "user", "content": "2 + 2?"}]
F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}


async def chat(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """The choice of a whole answer, to which what is streamed has to add up."""
    answer = await http.post("/v1/chat/completions", json={"messages": USER} | body)
    choice: dict[str, Any] = answer.json()["choices"][0]
    streamed = await http.post("/v1/chat/completions", json={"messages": USER, "stream": True} | body)
    deltas = [event["choices"][0]["delta"] for event in events_of(streamed.content)]
    for key in ("content", "reasoning_content"):
        assert "".join(delta.get(key) or "" for delta in deltas) == (choice["message"].get(key) or "")
    assert [delta.get("role") for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert events_of(streamed.content)[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    return choice


async def test_a_thought_stands_beside_the_words(http: httpx.AsyncClient, says: Says) -> None:
    says("Two and two.\n</think>\n\nFour.")
    message = (await chat(http))["message"]
    assert message == {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}


@pytest.mark.parametrize(("text", "content"), [("Two and two.\n</think>\n\nFour.", "Four."), ("Two and", "")])
@pytest.mark.parametrize("logprobs", [False, True])
async def test_a_thought_is_left_out_for_who_does_not_want_it(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    model: TextTokenizer,
    text: str,
    content: str,
    logprobs: bool,
) -> None:
    engine.script.events = one_by_one(model._encode(text, False), FinishReason.LENGTH)
    choice = await chat(http, include_reasoning=False, logprobs=logprobs)
    assert choice["message"] == {"role": "assistant", "content": content}
    seen = await chat(http, include_reasoning=None)
    assert seen["message"]["reasoning_content"].startswith("Two and")


async def test_an_answer_without_a_thought_has_no_key_for_it(http: httpx.AsyncClient, says: Says) -> None:
    says("</think>Four.")
    assert (await chat(http))["message"] == {"role": "assistant", "content": "Four."}


async def test_a_thought_without_end(http: httpx.AsyncClient, engine: FakeEngine, model: TextTokenizer) -> None:
    engine.script.events = one_by_one(model._encode("Two and", False), FinishReason.LENGTH)
    choice = await chat(http, logprobs=True)
    assert choice["message"] == {"role": "assistant", "content": "", "reasoning_content": "Two and"}
    assert choice["finish_reason"] == "length"


async def test_calls_count_after_the_thought_only(http: httpx.AsyncClient, says: Says) -> None:
    says(f"maybe {CALL}\n</think>\n\n{CALL}")
    choice = await chat(http, tools=[F])
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == f"maybe {CALL}"
    assert (choice["message"]["content"], len(choice["message"]["tool_calls"])) == (None, 1)


@pytest.mark.parametrize("config", [{"reasoning_parser": "off"}, {"is_strict_tgi": True, "reasoning_parser": "qwen3"}])
async def test_off_and_strictly_a_thought_is_text(
    engine: FakeEngine, model: TextTokenizer, says: Says, config: dict[str, Any]
) -> None:
    says("Hm.\n</think>\n\nFour.")
    async with client_of(create_app(engine, make_config(**config), model)) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": USER})
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": "Hm.\n</think>\n\nFour."}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
REQUIRED = {"tools": [F], "tool_choice": "required"}


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ({"response_format": FORMAT}, '{"a": 5}'),
        (REQUIRED, CALL),
        ({"response_format": {"type": "regex", "value": "x+y"}}, "xy"),
    ],
    ids=["schema", "tools", "regex"],
)
@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_grammar_holds_what_comes_after_the_thought(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    model: TextTokenizer,
    says: Says,
    body: dict[str, Any],
    answer: str,
    has_begun: bool,
) -> None:
    says(f"Hm.\n</think>\n\n{answer}")
    messages = USER if has_begun else [*USER, {"role": "assistant", "content": ""}]
    choice = await chat(http, messages=messages, **body)
    if has_begun:
        assert choice["message"]["reasoning_content"] == "Hm."
    grammar = engine.requests[0].grammar
    vocabulary = LLTokenizer(model._tokenizer.to_str())

    def is_allowed(text: str) -> bool:
        matcher = LLMatcher(vocabulary, grammar)
        ids = model._encode(text, False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    start = "" if has_begun else "<think>"
    assert is_allowed(f"{start}\nHm. {{ x }}\n</think>\n\n{answer}")
    assert is_allowed(f"{start}</think>{answer}")
    assert not is_allowed(f"{start}Hm.</think>{answer[1:]}")
    assert not is_allowed(f"{start}Hm.")
    assert not is_allowed(f"{start}Hm.</think>\n\n\n{answer}")
    assert is_allowed(answer) is not has_begun


async def test_thoughts_in_responses(http: httpx.AsyncClient, says: Says) -> None:
    says("Two and two.\n</think>\n\nFour.")
    sdk = openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=http)
    whole = await sdk.responses.create(model="m", input="2 + 2?")
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output_text == "Four."
    async with sdk.responses.stream(model="m", input="2 + 2?") as stream:
        events = [event async for event in stream]
    thought = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    done = [event.text for event in events if event.type == "response.reasoning_text.done"]
    assert "".join(thought) == "".join(done) == "Two and two."
    again = [item.model_dump(exclude_none=True) for item in whole.output]
    await sdk.responses.create(model="m", input=[{"role": "user", "content": "?"}, *again])  # type: ignore[list-item]


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}])
async def test_thoughts_in_messages(http: httpx.AsyncClient, says: Says, thinking: dict[str, Any] | None) -> None:
    says("Two and two.\n</think>\n\nFour.")
    body = {"messages": USER, "max_tokens": 100, "thinking": thinking}
    answer = (await http.post("/v1/messages", json=body)).json()
    block = {"type": "thinking", "thinking": "Two and two.", "signature": ""}
    is_shown = thinking is not None and thinking["type"] == "enabled"
    assert answer["content"] == [*([block] if is_shown else []), {"type": "text", "text": "Four."}]
    streamed = (await http.post("/v1/messages", json=body | {"stream": True})).text
    deltas = [json.loads(line[6:]).get("delta", {}) for line in streamed.splitlines() if line.startswith("data: ")]
    assert "".join(delta.get("thinking", "") for delta in deltas) == ("Two and two." if is_shown else "")
    assert "".join(delta.get("text", "") for delta in deltas) == "Four."
