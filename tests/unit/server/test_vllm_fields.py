"""Fields that vLLM's clients send (`extra_body`): each has its effect on both of OpenAI's routes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from server.app import create_app
from server.errors import ValidationError
from server.requests import ignored
from server.requests.rows import Dialect
from server.requests.sampling import Parameters
from server.requests.validation import check_parameters
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import (
    FakeEngine,
    client_of,
    events_of,
    make_config,
    one_by_one,
    write_model_folder,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hey"}]},
    COMPLETIONS: {"prompt": "x"},
}
IdsOf = Callable[[str], list[int]]
both_routes = pytest.mark.parametrize("path", BODIES)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


async def ask(client: httpx.AsyncClient, path: str, **said: Any) -> httpx.Response:
    return await client.post(path, json=BODIES[path] | said)


async def text_of(client: httpx.AsyncClient, path: str, **said: Any) -> str:
    response = await ask(client, path, **said)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    text: str = choice["message"]["content"] if path == CHAT else choice["text"]
    return text


GBNF = 'root ::= "yes" | "no" [0-9]+ "!"'
LARK = 'start: "yes" | "no" NUMBER "!"\nNUMBER: /[0-9]+/'


@pytest.mark.parametrize("grammar", [GBNF, LARK, LARK + '\n%llguidance {"no_forcing": false}'])
async def test_texts_are_held_to_a_grammar_and_nothing_is_forced(
    client: httpx.AsyncClient, engine: FakeEngine, grammar: str
) -> None:
    response = await ask(client, CHAT, guided_grammar=grammar)
    assert response.status_code == 200, response.text
    made = engine.requests[-1].grammar
    assert made is not None
    tokenizer = LLTokenizer("byte")
    for text, is_right in [("yes", True), ("no42!", True), ("no!", False), ("yess", False), ("no4", False)]:
        matcher = LLMatcher(tokenizer, made, log_level=0)
        is_taken = all(matcher.try_consume_tokens([byte]) == 1 for byte in text.encode())
        assert (is_taken and matcher.is_accepting()) == is_right, text
    matcher = LLMatcher(tokenizer, made, log_level=0)
    matcher.consume_token(ord("y"))
    assert matcher.compute_ff_tokens() == []


async def test_a_grammar_is_for_openais_routes_alone_and_not_beside_tools(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    response = await ask(client, CHAT, guided_grammar=LARK, tools=[tool])
    assert response.status_code == 400
    assert "a grammar can't be held to beside `tools`" in response.json()["error"]["message"]
    native = {"inputs": "a", "parameters": {"grammar": {"type": "grammar", "value": LARK}}}
    assert (await client.post("/generate", json=native)).status_code == 422
    assert (await ask(strict_client, CHAT, response_format={"type": "grammar", "grammar": LARK})).status_code == 422


async def streamed_text(client: httpx.AsyncClient, path: str, **said: Any) -> str:
    choices = [event["choices"][0] for event in events_of((await ask(client, path, stream=True, **said)).content)]
    return "".join(choice["delta"].get("content", "") if path == CHAT else choice["text"] for choice in choices)


@both_routes
@pytest.mark.parametrize(
    ("said", "same"),
    [
        ({"guided_json": CITY}, {"type": "json", "value": CITY}),
        ({"guided_json": json.dumps(CITY)}, {"type": "json", "value": CITY}),
        ({"structured_outputs": {"json": CITY}}, {"type": "json", "value": CITY}),
        ({"guided_json": CITY, "structured_outputs": {"json": CITY}}, {"type": "json", "value": CITY}),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, {"type": "regex", "value": "a"}),
        ({"guided_choice": ["a"], "structured_outputs": {"choice": ["a"]}}, {"type": "regex", "value": "a"}),
        ({"structured_outputs": {"json_object": True}}, {"type": "json_object"}),
        ({"guided_regex": "[a-z]{3}"}, {"type": "regex", "value": "[a-z]{3}"}),
        ({"structured_outputs": {"regex": "[a-z]{3}", "json": None}}, {"type": "regex", "value": "[a-z]{3}"}),
        ({"guided_choice": ["yes", "no"]}, {"type": "regex", "value": "yes|no"}),
        ({"structured_outputs": {"choice": ["a+b", "c. d"]}}, {"type": "regex", "value": r"a\+b|c\.\ d"}),
        ({"guided_grammar": GBNF}, {"type": "grammar", "grammar": GBNF}),
        ({"structured_outputs": {"grammar": LARK}}, {"type": "grammar", "grammar": LARK}),
        ({"guided_grammar": LARK, "structured_outputs": {"grammar": LARK}}, {"type": "grammar", "grammar": LARK}),
    ],
)
async def test_constraints(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine, path: str, said: Any, same: Any
) -> None:
    for body in (said, {"response_format": same}):
        response = await ask(client, path, **body)
        assert response.status_code == 200, response.text
    guided, formatted = (request.grammar for request in engine.requests)
    assert guided is not None
    assert guided == formatted
    assert (await ask(strict_client, path, **said)).status_code == 200
    assert engine.requests[-1].grammar is None


@both_routes
@pytest.mark.parametrize(
    ("said", "reason", "param"),
    [
        ({"guided_grammar": "root ::= (("}, "Expected ')' at line 1", "guided_grammar"),
        ({"guided_grammar": ""}, "No 'root' rule found", "guided_grammar"),
        ({"guided_grammar": "root ::= " + "(" * 5000 + ")" * 5000}, "nested too deeply", "guided_grammar"),
        ({"guided_grammar": "start: b"}, "grammar is not valid", "guided_grammar"),
        ({"guided_grammar": '{"grammars": [{"json_schema": {}}]}'}, "grammar is not valid", "guided_grammar"),
        ({"guided_grammar": 5}, "guided_grammar: invalid type: integer `5`, expected a string", "guided_grammar"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "`structural_tag` is not supported",
            "structured_outputs.structural_tag",
        ),
        ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, "only one constraint", "guided_regex"),
        ({"guided_json": CITY, "guided_regex": "a"}, "guided_json and guided_regex: only one", "guided_json"),
        ({"structured_outputs": {"json": CITY, "regex": "a"}}, ": only one constraint", "structured_outputs"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, ": only one constraint", "guided_regex"),
        (
            {"response_format": {"type": "grammar"}},
            "response_format.grammar: a grammar is a string",
            "response_format.grammar",
        ),
        ({"guided_choice": []}, "guided_choice: invalid value", "guided_choice"),
        ({"guided_choice": "yes"}, "guided_choice: invalid value", "guided_choice"),
        ({"guided_choice": ["yes", ""]}, "guided_choice: invalid value", "guided_choice"),
        (
            {"structured_outputs": {"choice": [5]}},
            "structured_outputs.choice: invalid value",
            "structured_outputs.choice",
        ),
        ({"structured_outputs": "json"}, "structured_outputs: invalid type", "structured_outputs"),
        ({"structured_outputs": []}, "structured_outputs: invalid type", "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs: there is no constraint", "structured_outputs"),
        ({"structured_outputs": {"foo": 1}}, "structured_outputs: there is no constraint", "structured_outputs"),
        (
            {"guided_regex": "a", "structured_outputs": {"disable_any_whitespace": True}},
            "structured_outputs: there is no constraint",
            "structured_outputs",
        ),
        ({"guided_regex": "("}, "grammar is not valid", "guided_regex"),
        ({"structured_outputs": {"regex": "("}}, "grammar is not valid", "structured_outputs.regex"),
        ({"guided_json": 5}, "grammar is not supported", "guided_json"),
        ({"guided_json": 5, "format_key": "x"}, "grammar is not supported", "guided_json"),
        ({"response_format": {"type": "regex", "value": "("}, "format_key": 5}, "not valid", "response_format"),
    ],
)
async def test_constraints_that_cannot_be_held_to(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, said: Any, reason: str, param: str
) -> None:
    response = await ask(client, path, **said)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert reason in error["message"]
    assert not engine.requests


async def test_constraints_beside_tools_are_called_as_they_were_sent(client: httpx.AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for key, value in (("guided_json", 5), ("guided_regex", 5), ("guided_regex", "(")):
        response = await ask(client, CHAT, tools=tools, **{key: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, key)


@both_routes
async def test_a_constraint_beside_a_format_that_is_none(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    assert (await ask(client, path, guided_choice=["yes"], response_format={"type": "text"})).status_code == 200
    assert engine.requests[0].grammar is not None


@both_routes
async def test_no_constraint(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    said = {"guided_json": None, "guided_choice": None, "structured_outputs": None}
    assert (await ask(client, path, **said)).status_code == 200
    assert (await ask(client, path, structured_outputs={"json": None})).status_code == 200
    assert [request.grammar for request in engine.requests] == [None, None]


@both_routes
async def test_special_tokens_are_shown(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, path: str
) -> None:
    engine.script.events = one_by_one(ids_of("Hello<|im_start|>, world!<|im_end|>"))
    for read in (text_of, streamed_text):
        assert await read(client, path) == "Hello, world!"
        assert await read(client, path, skip_special_tokens=True) == "Hello, world!"
        assert await read(client, path, skip_special_tokens=False) == "Hello<|im_start|>, world!", "but not the end"
        said = {"skip_special_tokens": False, "include_stop_str_in_output": True}
        assert await read(client, path, **said) == "Hello<|im_start|>, world!<|im_end|>"


@both_routes
@pytest.mark.parametrize("stop", ["wor", ["world!?", "o, w"], ["never"]])
async def test_the_stop_string_is_shown(client: httpx.AsyncClient, path: str, stop: Any) -> None:
    full = "Hello, world!"
    for read in (text_of, streamed_text):
        hidden = await read(client, path, stop=stop)
        shown = await read(client, path, stop=stop, include_stop_str_in_output=True)
        (found,) = [text for text in ([stop] if isinstance(stop, str) else stop) if text in full] or [""]
        assert shown == hidden + found
        assert full.startswith(shown)


@pytest.mark.parametrize(
    ("path", "said"),
    [(CHAT, {}), (COMPLETIONS, {"prompt": "Hello, world!"}), (COMPLETIONS, {"prompt": [[5, 6, 7, 8]]})],
)
async def test_the_last_tokens_of_a_prompt(client: httpx.AsyncClient, engine: FakeEngine, path: str, said: Any) -> None:
    for truncation in ({}, {"truncate_prompt_tokens": 2}):
        response = await ask(client, path, **said, **truncation)
        assert response.status_code == 200
    whole, cut = (request.prompt_token_ids for request in engine.requests)
    assert len(whole) > 2
    assert cut == whole[-2:]
    assert response.json()["usage"]["prompt_tokens"] == 2
    for wrong in (0, -2, 5000):
        refused = await ask(client, path, **said, truncate_prompt_tokens=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


@pytest.mark.parametrize(
    ("said", "num_kept"),
    [
        ({}, 1023),
        ({"max_tokens": 24}, 1000),
        ({"max_tokens": 1023}, 1),
        ({"max_tokens": 1}, 1023),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_as_much_of_a_prompt_as_fits(
    client: httpx.AsyncClient, engine: FakeEngine, said: Any, num_kept: int, stream: bool
) -> None:
    """-1 keeps what the window has room for, beside the new tokens."""
    long = {"prompt": [5] + [6] * 2_000, "truncate_prompt_tokens": -1, "stream": stream}
    response = await ask(client, COMPLETIONS, **long, **said)
    assert response.status_code == 200, response.text
    assert engine.requests[0].prompt_token_ids == [6] * num_kept
    short = await ask(client, COMPLETIONS, prompt=[7, 8], truncate_prompt_tokens=-1, **said)
    assert (short.status_code, engine.requests[1].prompt_token_ids) == (200, [7, 8][-num_kept:])


async def test_as_much_of_a_prompt_as_fits_beside_more_new_tokens_than_there_can_be(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.limits_now = msgspec.structs.replace(engine.limits_now, max_input_tokens=1_999, max_total_tokens=2_000)
    for max_tokens, num_kept in ((1_500, 500), (1_999, 1), (2_000, 976), (10**6, 976)):
        said = {"prompt": [6] * 3_000, "truncate_prompt_tokens": -1, "max_tokens": max_tokens}
        assert (await ask(client, COMPLETIONS, **said)).status_code == 200
        assert len(engine.requests[-1].prompt_token_ids) == num_kept
        assert engine.requests[-1].max_new_tokens == min(max_tokens, 2_000 - num_kept)


@both_routes
async def test_fields_without_effect_are_told_once(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A name is the client's text: it is escaped, shortened, and there are only so many of them."""
    monkeypatch.setattr(ignored, "_lines", set())
    monkeypatch.setattr(ignored, "MAX_LINES", 5)
    said = {"priority": 1, "user": "me", 'a"\n\u2028': 1, "x" * 10_000: 1, "temperature": 0, "guided_regex": "a"}
    with caplog.at_level(logging.DEBUG, "server.requests.ignored"):
        for _ in range(3):
            assert (await ask(client, path, **said)).status_code == 200
        assert (await ask(client, path, **{f"field{number}": 1 for number in range(50)})).status_code == 200
    lines = [record.getMessage() for record in caplog.records if record.name == "server.requests.ignored"]
    assert len(lines) == 5
    assert "a request has the field 'priority', which has no effect" in lines
    assert all(line.isascii() and line.isprintable() and len(line) < 200 for line in lines)
    assert not any("temperature" in line or "guided" in line for line in lines)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hey", "truncation": "auto", "text": None}),
        ("/v1/messages", {"messages": BODIES[CHAT]["messages"], "max_tokens": 5, "truncation": "auto"}),
        ("/invocations", {"prompt": "x", "best_of": 1, "truncation": "auto"}),
    ],
)
async def test_bodies_of_other_shapes_tell_of_them_as_well(
    client: httpx.AsyncClient,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
) -> None:
    monkeypatch.setattr(ignored, "_lines", set())
    with caplog.at_level(logging.DEBUG, "server.requests.ignored"):
        assert (await client.post(path, json=body)).status_code == 200
    assert [record.getMessage() for record in caplog.records if record.name == "server.requests.ignored"] == [
        "a request has the field 'truncation', which has no effect"
    ]


@both_routes
async def test_above_debug_level_nothing_is_told(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with caplog.at_level(logging.INFO, "server"):
        assert (await ask(client, path, secret_field=1)).status_code == 200
    assert not re.search("secret_field", caplog.text)


@both_routes
async def test_to_tgi_they_are_unknown(
    strict_client: httpx.AsyncClient, engine: FakeEngine, tokenizer: TextTokenizer, path: str
) -> None:
    said = {"truncate_prompt_tokens": 1, "skip_special_tokens": False, "include_stop_str_in_output": 5}
    assert await text_of(strict_client, path, **said) == "Hello, world!"
    plain = await ask(strict_client, path)
    assert engine.requests[0].prompt_token_ids == engine.requests[1].prompt_token_ids
    assert plain.status_code == 200


@both_routes
async def test_what_the_engine_is_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: TextTokenizer, path: str
) -> None:
    said = {"min_tokens": 3, "stop_token_ids": [7, 9], "allowed_token_ids": [5, 6, 7], "bad_words": ["Hello", "a b"]}
    assert (await ask(client, path, **said)).status_code == 200
    (request,) = engine.requests
    assert (request.sampling.min_tokens, request.sampling.allowed_token_ids) == (3, [5, 6, 7])
    assert request.stop_token_ids == [7, 9]
    assert [tokenizer.decode(ids) for ids in request.banned_sequences] == ["Hello", " Hello", "a b", " a b"]


@both_routes
async def test_the_stop_token_is_not_part_of_the_text(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, path: str
) -> None:
    engine.script.events = one_by_one(ids_of("Hello, world!"))
    (stop,) = ids_of("!")
    for read in (text_of, streamed_text):
        assert await read(client, path, stop_token_ids=[stop]) == "Hello, world"
        assert await read(client, path, stop_token_ids=[stop], include_stop_str_in_output=True) == "Hello, world!"


@both_routes
async def test_no_stop_string_ends_a_text_that_is_too_short(client: httpx.AsyncClient, path: str) -> None:
    assert await text_of(client, path, stop="Hello") == ""
    assert await text_of(client, path, stop="Hello", min_tokens=1) == "Hello, world!"
    assert await text_of(client, path, stop="wor", min_tokens=2) == "Hello, "


@both_routes
@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [10**7]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**7]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [" \n"]}, "bad_words"),
        ({"bad_words": ["a"] * 257}, "bad_words"),
        ({"bad_words": ["a" * 129]}, "bad_words"),
    ],
)
async def test_bans_that_make_no_sense(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, said: Any, param: str
) -> None:
    response = await ask(client, path, **said)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not engine.requests


def test_allowed_tokens_have_a_limit() -> None:
    check_parameters(Parameters(allowed_token_ids=[1] * 16_384), make_config(), Dialect.CHAT)
    with pytest.raises(ValidationError, match="`allowed_token_ids` supports up to 16384 tokens. Given: 16385"):
        check_parameters(Parameters(allowed_token_ids=[1] * 16_385), make_config(), Dialect.CHAT)


@both_routes
async def test_no_log_line_has_a_bad_word(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with caplog.at_level(logging.INFO, "server"):
        said = {"bad_words": ["secret"], "allowed_token_ids": list(range(100)), "min_tokens": 2}
        assert (await ask(client, path, **said)).status_code == 200
    (record,) = (record for record in caplog.records if record.message == "Success")
    parameters = vars(record)["span"]["parameters"]
    assert "secret" not in parameters
    assert "'min_tokens': 2" in parameters
    assert "'allowed_token_ids': <100 entries>" in parameters


TEMPLATE = (
    "{{ messages[0]['content'] }}|{{ enable_thinking }}|{{ style | default('plain') }}|{{ eos_token }}|"
    "{% if add_generation_prompt %}go{% endif %}{% if documents %}{{ documents[0]['title'] }}{% endif %}"
)


@pytest.mark.parametrize(
    ("variables", "prompt"),
    [
        ({}, "hey||plain|<|im_end|>|go"),
        (None, "hey||plain|<|im_end|>|go"),
        ({"enable_thinking": False, "style": "wild"}, "hey|False|wild|<|im_end|>|go"),
        ({"style": ["a", {"b": None}]}, "hey||['a', {'b': None}]|<|im_end|>|go"),
        ({"eos_token": "END"}, "hey||plain|END|go"),
        ({"messages": [], "add_generation_prompt": False, "tools": 5}, "hey||plain|<|im_end|>|go"),
        ({"self": 1, "args": 2, "variables": 3}, "hey||plain|<|im_end|>|go"),
        ({"documents": [{"title": "A"}]}, "hey||plain|<|im_end|>|goA"),
    ],
)
async def test_what_a_template_may_look_at(engine: FakeEngine, tmp_path: Path, variables: Any, prompt: str) -> None:
    write_model_folder(tmp_path, TEMPLATE)
    tokenizer = TextTokenizer.from_folder(str(tmp_path), 1)
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        assert (await ask(client, CHAT, chat_template_kwargs=variables)).status_code == 200
        assert tokenizer.decode(engine.requests[0].prompt_token_ids) == prompt
        refused = await ask(client, CHAT, chat_template_kwargs=[variables])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template_kwargs")


async def test_tgi_has_no_variables(engine: FakeEngine, tmp_path: Path) -> None:
    write_model_folder(tmp_path, TEMPLATE)
    tokenizer = TextTokenizer.from_folder(str(tmp_path), 1)
    async with client_of(create_app(engine, make_config(is_strict_tgi=True), tokenizer)) as client:
        assert (await ask(client, CHAT, chat_template_kwargs={"style": "wild"})).status_code == 200
    assert "plain" in tokenizer.decode(engine.requests[0].prompt_token_ids)


@both_routes
@pytest.mark.parametrize("num_top", [0, 2])
async def test_logprobs_of_a_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: TextTokenizer, path: str, num_top: int
) -> None:
    said = {"prompt": [[5, 6, 7]]} if path == COMPLETIONS else {}
    await ask(client, path, **said)
    ids = engine.requests[0].prompt_token_ids
    first = engine.script.events[0]
    first.prompt_logprobs, first.prompt_ranks = [-3.0] * (len(ids) - 1), [7] * (len(ids) - 1)
    if num_top:
        first.prompt_top_token_ids = [[ids[1], 9]] * (len(ids) - 1)
        first.prompt_top_logprobs = [[-0.25, -0.5]] * (len(ids) - 1)
    response = await ask(client, path, **said, prompt_logprobs=num_top)
    assert response.status_code == 200, response.text
    assert (engine.requests[1].has_prompt_logprobs, engine.requests[1].num_prompt_top_tokens) == (True, num_top)
    assert [request.has_prompt_ranks for request in engine.requests] == [False, True]
    answer = response.json()
    scores = answer["prompt_logprobs"] if path == CHAT else answer["choices"][0]["prompt_logprobs"]
    assert len(scores) == len(ids)
    assert scores[0] is None
    own = {"logprob": -3.0, "rank": 7, "decoded_token": tokenizer.decode([ids[2]])}
    assert scores[2][str(ids[2])] == own
    if num_top:
        assert scores[1] == {
            str(ids[1]): {"logprob": -0.25, "rank": 1, "decoded_token": tokenizer.decode([ids[1]])},
            "9": {"logprob": -0.5, "rank": 2, "decoded_token": tokenizer.decode([9])},
        }
    else:
        assert [*scores[2]] == [str(ids[2])]


@both_routes
@pytest.mark.parametrize("said", [{"prompt_logprobs": 21}, {"prompt_logprobs": 0, "stream": True}])
async def test_logprobs_of_a_prompt_that_there_are_not(client: httpx.AsyncClient, path: str, said: Any) -> None:
    response = await ask(client, path, **said)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt_logprobs")


@both_routes
@pytest.mark.parametrize("number", [-1, -2, 21, 10**6])
async def test_nobody_gets_the_logprobs_of_all_tokens(client: httpx.AsyncClient, path: str, number: int) -> None:
    response = await ask(client, path, prompt_logprobs=number)
    text = f"`prompt_logprobs` must be >= 0 and <= 20, not all tokens of the model (-1). Given: {number}"
    assert (response.status_code, response.json()["error"]["message"]) == (400, f"Input validation error: {text}")


async def test_too_many_likeliest_tokens_of_a_prompt_are_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.limits_now = msgspec.structs.replace(engine.limits_now, max_input_tokens=8_000, max_total_tokens=9_000)
    response = await ask(client, COMPLETIONS, prompt=[5] * 6_554, prompt_logprobs=20)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt_logprobs")


@both_routes
async def test_nobody_gets_logprobs_of_a_prompt_unasked(client: httpx.AsyncClient, path: str) -> None:
    assert "prompt_logprobs" not in (await ask(client, path)).text
