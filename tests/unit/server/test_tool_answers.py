"""Chats with tools over HTTP: calls in the answers, whole and streamed, and what the engine is held to."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from engine.link.messages import FinishReason
from tests.unit.server.harness import FakeEngine, events_of, one_by_one

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Weather?"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, CLOCK]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ROME = PARIS.replace("Paris", "Rome")
TGI_PARIS = '{"function": {"_name": "get_weather", "city": "Paris"}}'
TGI_NO_TOOL = '{"function": {"_name": "no_tool"}}'
WRONG = PARIS.replace("get_weather", "unknown")

IdsOf = Callable[[str], list[int]]


async def chat(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.post(PATH, json={"messages": [USER], "tools": TOOLS} | body)


async def stream(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await chat(http, stream=True, **body)
    assert response.content.endswith(b"data: [DONE]\n\n")
    return events_of(response.content)


def says(engine: FakeEngine, ids_of: IdsOf, *texts: str, reason: FinishReason = FinishReason.EOS_TOKEN) -> None:
    """What the model writes for the first, second, ... request."""
    end = "<|im_end|>" if reason is FinishReason.EOS_TOKEN else ""
    engine.script.scripts = [one_by_one(ids_of(text + end), reason) for text in texts]


def names_and_arguments(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


async def test_calls(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    says(engine, ids_of, f"Let me look.\n{PARIS}\n{ROME}")
    choice = (await chat(client)).json()["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert list(message) == ["role", "content", "tool_calls"]
    assert message["content"] == "Let me look."
    assert names_and_arguments(message) == [("get_weather", '{"city": "Paris"}'), ("get_weather", '{"city": "Rome"}')]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2 and all(re.fullmatch("call_[0-9a-f]{24}", id) for id in ids)
    assert all(call["type"] == "function" for call in message["tool_calls"])
    assert engine.requests[0].grammar is None


async def test_calls_alone_have_no_content(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    says(engine, ids_of, PARIS)
    message = (await chat(client)).json()["choices"][0]["message"]
    assert message["content"] is None


@pytest.mark.parametrize("text", ["It rains.", WRONG, '```json\n{"name": "clock", "arguments": {}}\n```'])
async def test_what_is_no_call_is_content(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, text: str
) -> None:
    says(engine, ids_of, text, text)
    choice = (await chat(client)).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text}
    assert choice["finish_reason"] == "stop"
    chunks = await stream(client)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_choice_none_reads_no_calls(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    says(engine, ids_of, PARIS)
    choice = (await chat(client, tool_choice="none")).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": PARIS}
    assert choice["finish_reason"] == "stop"


async def test_one_call_at_most(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    says(engine, ids_of, f"{PARIS}\n{ROME}")
    message = (await chat(client, parallel_tool_calls=False)).json()["choices"][0]["message"]
    assert names_and_arguments(message) == [("get_weather", '{"city": "Paris"}')]


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_call_that_is_cut_off(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, choice: str
) -> None:
    says(engine, ids_of, PARIS[:-16], reason=FinishReason.LENGTH)
    answer = (await chat(client, tool_choice=choice)).json()["choices"][0]
    assert names_and_arguments(answer["message"]) == [("get_weather", '{"city": "Paris')]
    assert answer["finish_reason"] == "length"


async def test_a_stop_string_in_a_call(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    says(engine, ids_of, PARIS)
    answer = (await chat(client, stop="ris")).json()["choices"][0]
    assert answer["message"] == {"role": "assistant", "content": PARIS.partition("ris")[0]}
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_stream_is_in_the_order_of_openai(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, choice: str
) -> None:
    says(engine, ids_of, f"{PARIS}\n{ROME}")
    *chunks, usage = await stream(client, tool_choice=choice, stream_options={"include_usage": True})
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(ids_of(f"{PARIS}\n{ROME}")) + 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert choices[-1]["delta"] == {}
    assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    calls = [choice["delta"]["tool_calls"][0] for choice in choices[:-1]]
    first, second = ([call for call in calls if call["index"] == index] for index in (0, 1))
    assert calls == first + second
    for (head, *parts), city in ((first, "Paris"), (second, "Rome")):
        assert head == {
            "index": head["index"],
            "id": head["id"],
            "type": "function",
            "function": {"name": "get_weather", "arguments": ""},
        }
        assert all(part.keys() == {"index", "function"} for part in parts)
        assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {"city": city}
        assert len(parts) > 1 or choice == "auto"  # where the end is certain, arguments come as they are written
    assert first[0]["id"] != second[0]["id"]


async def test_several_choices(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    says(engine, ids_of, PARIS, "It rains.", PARIS, "It rains.")
    first, second = (await chat(client, n=2)).json()["choices"]
    assert names_and_arguments(first["message"]) == [("get_weather", '{"city": "Paris"}')]
    assert second["message"] == {"role": "assistant", "content": "It rains."}
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    choices = [chunk["choices"][0] for chunk in await stream(client, n=2)]
    ends = {choice["index"]: choice["finish_reason"] for choice in choices if choice["finish_reason"]}
    assert ends == {0: "tool_calls", 1: "stop"}
    words = [choice["delta"].get("content", "") for choice in choices if choice["index"] == 1]
    assert "".join(words) == "It rains."


async def test_every_token_has_its_logprobs(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    says(engine, ids_of, PARIS, PARIS, PARIS)
    expected = (await chat(client, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert "".join(item["token"] for item in expected) == f"{PARIS}<|im_end|>"
    for choice in ("auto", "required"):
        chunks = await stream(client, logprobs=True, tool_choice=choice)
        logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [item for one in logprobs if one for item in one["content"]] == expected


@pytest.mark.parametrize(
    ("body", "num_functions", "is_single"),
    [
        ({"tool_choice": "required"}, 2, False),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 2, True),
        ({"tool_choice": "clock"}, 1, True),
        ({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, 1, True),
        ({"tool_choice": "clock", "parallel_tool_calls": True}, 1, True),
    ],
)
async def test_a_call_can_be_required(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    ids_of: IdsOf,
    body: dict[str, Any],
    num_functions: int,
    is_single: bool,
) -> None:
    says(engine, ids_of, PARIS)
    await chat(client, **body)
    grammar = engine.requests[0].grammar
    assert grammar is not None
    assert grammar.count("%json") == num_functions
    assert ("start: call\n" in grammar) == is_single


@pytest.mark.parametrize("choice", ["clock", {"type": "function", "function": {"name": "clock"}}])
async def test_a_call_of_the_function_that_was_named_is_no_decision(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, choice: Any
) -> None:
    """So the reason is `stop`, as OpenAI has it."""
    says(engine, ids_of, *[PARIS.replace("get_weather", "clock")] * 2)
    answer = (await chat(client, tool_choice=choice)).json()["choices"][0]
    assert answer["finish_reason"] == "stop" and len(answer["message"]["tool_calls"]) == 1
    assert (await stream(client, tool_choice=choice))[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_same_call_is_never_written_twice(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf
) -> None:
    """The answer ends with the first repetition, and nobody hears of that."""
    written = f"{PARIS}\n{ROME}\n{PARIS}"
    says(engine, ids_of, *[f"{written}\n{ROME}\n{PARIS}"] * 2, reason=FinishReason.LENGTH)
    body = (await chat(client, tool_choice="required")).json()
    expected = [("get_weather", '{"city": "Paris"}'), ("get_weather", '{"city": "Rome"}')]
    assert names_and_arguments(body["choices"][0]["message"]) == expected
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert body["usage"]["completion_tokens"] <= len(ids_of(written))
    assert len(engine.aborted) == 1, "the engine goes on no longer"
    choices = [chunk["choices"][0] for chunk in await stream(client, tool_choice="required")]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls) == "".join(text for _, text in expected)
    assert choices[-1]["finish_reason"] == "tool_calls"


BARE_PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'


@pytest.mark.parametrize(
    "text", [BARE_PARIS, f"\n{BARE_PARIS} \n", f'{BARE_PARIS}\n{{"name": "clock", "arguments": {{}}}}']
)
async def test_an_answer_of_nothing_but_calls_needs_no_marks(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, text: str
) -> None:
    says(engine, ids_of, text, text)
    answer = (await chat(client)).json()["choices"][0]
    called = names_and_arguments(answer["message"])
    assert called[0] == ("get_weather", '{"city": "Paris"}') and len(called) == 1 + text.count("clock")
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
    choices = [chunk["choices"][0] for chunk in await stream(client)]
    assert all("content" not in choice["delta"] for choice in choices)
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [call["function"]["name"] for call in calls if "id" in call] == [name for name, _ in called]
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_bare_calls_that_repeat_themselves(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    """Within an answer they end it; once they are answered they are content, until the user speaks again."""
    says(engine, ids_of, "\n".join([BARE_PARIS] * 9), BARE_PARIS, BARE_PARIS, reason=FinishReason.LENGTH)
    body = (await chat(client)).json()
    called = body["choices"][0]["message"]
    assert names_and_arguments(called) == [("get_weather", '{"city": "Paris"}')]
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert body["usage"]["completion_tokens"] <= len(ids_of("\n".join([BARE_PARIS] * 2)))
    answered = [USER, called, {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "rain"}]
    assert (await chat(client, messages=answered)).json()["choices"][0]["message"]["content"] == BARE_PARIS
    again = (await chat(client, messages=[*answered, USER])).json()["choices"][0]["message"]
    assert names_and_arguments(again) == [("get_weather", '{"city": "Paris"}')]


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_every_shape_tells_the_same_calls_of_as_many_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, choice: str
) -> None:
    texts = [f"{PARIS}\n{PARIS}\n{ROME}", PARIS[:-16], f"{BARE_PARIS}\n{BARE_PARIS}", "It rains."]
    for text, reason in itertools.product(texts, (FinishReason.EOS_TOKEN, FinishReason.LENGTH)):
        says(engine, ids_of, *[text] * 4, reason=reason)
        await compare_shapes(client, choice)


async def compare_shapes(client: httpx.AsyncClient, choice: str) -> None:
    whole = (await chat(client, tool_choice=choice)).json()
    *chunks, last = await stream(client, tool_choice=choice, stream_options={"include_usage": True})
    flat = {"input": "Weather?", "tools": [{"type": "function"} | tool["function"] for tool in TOOLS]}
    response = (await client.post("/v1/responses", json=flat | {"tool_choice": choice})).json()
    tools = [{"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS]
    anthropic_choice = {"type": {"required": "any"}.get(choice, choice)}
    body = {"messages": [USER], "max_tokens": 99, "tools": tools, "tool_choice": anthropic_choice}
    message = (await client.post("/v1/messages", json=body)).json()

    calls = names_and_arguments({"tool_calls": []} | whole["choices"][0]["message"])
    parts = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(part["function"]["arguments"] for part in parts) == "".join(arguments for _, arguments in calls)
    items = [item for item in response["output"] if item["type"] == "function_call"]
    assert [(item["name"], item["arguments"]) for item in items] == calls
    blocks = [block for block in message["content"] if block["type"] == "tool_use"]
    assert [block["name"] for block in blocks] == [name for name, _ in calls]
    num_tokens = whole["usage"]["completion_tokens"]
    assert last["usage"]["completion_tokens"] == num_tokens
    assert response["usage"]["output_tokens"] == message["usage"]["output_tokens"] == num_tokens


async def test_a_call_or_an_answer_in_the_schema(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    answer_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": CITY | {"title": "Answer"}}}
    says(engine, ids_of, PARIS, '{"city": "Oslo"}', BARE_PARIS, PARIS)
    called, answered, looking_like_a_call = [
        (await chat(client, response_format=answer_format)).json()["choices"][0] for _ in range(3)
    ]
    assert names_and_arguments(called["message"]) == [("get_weather", '{"city": "Paris"}')]
    assert called["finish_reason"] == "tool_calls"
    assert (answered["message"]["content"], answered["finish_reason"]) == ('{"city": "Oslo"}', "stop")
    assert looking_like_a_call["message"]["content"] == BARE_PARIS, "calls have their marks there"
    assert all("| answer" in (request.grammar or "") for request in engine.requests)
    await chat(client, response_format=answer_format, tool_choice="required")
    assert "Answer" not in (engine.requests[-1].grammar or "")


async def test_no_tools_are_no_reason_to_refuse_a_format(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for tools in ([], None):
        answer = await chat(client, tools=tools, response_format={"type": "json_object"})
        assert answer.status_code == 200 and engine.requests[-1].grammar


async def test_a_function_may_take_nothing(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    says(engine, ids_of, '<tool_call>\n{"name": "bare", "arguments": {}}\n</tool_call>')
    tools = [{"type": "function", "function": {"name": "bare"}}]
    message = (await chat(client, tools=tools, tool_choice="bare")).json()["choices"][0]["message"]
    assert names_and_arguments(message) == [("bare", "{}")]
    assert '"properties": {}, "additionalProperties": false' in (engine.requests[0].grammar or "")


async def test_the_loop_goes_on_with_the_answer_of_the_tool(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf
) -> None:
    says(engine, ids_of, PARIS, "18 degrees.")
    called = (await chat(client)).json()["choices"][0]["message"]
    answer = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "18"}
    message = (await chat(client, messages=[USER, called, answer])).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "18 degrees."}


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_failure_in_the_middle_of_a_call(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, choice: str
) -> None:
    engine.script.events = one_by_one(ids_of(PARIS[:60]), None)
    engine.script.error = "boom"
    *_, last = await stream(client, tool_choice=choice)
    assert last["error"]["message"] == "Request failed during generation: Server error: boom"


@pytest.mark.parametrize("is_strict", [False, True])
async def test_chat_tokenize_shows_the_prompt_of_the_chat(
    client: httpx.AsyncClient,
    strict_client: httpx.AsyncClient,
    engine: FakeEngine,
    ids_of: IdsOf,
    is_strict: bool,
) -> None:
    says(engine, ids_of, TGI_PARIS)
    http = strict_client if is_strict else client
    body = {"messages": [USER], "tools": [WEATHER, CLOCK], "tool_choice": "required"}
    await http.post(PATH, json=body)
    answer = (await http.post("/chat_tokenize", json=body)).json()
    assert [token["id"] for token in answer["tokenize_response"]] == engine.requests[0].prompt_token_ids
    assert "get_weather" in answer["templated_text"]


# As TGI does it.


@pytest.mark.parametrize("choice", ["auto", "required", "get_weather"])
async def test_call_as_tgi_answers(
    strict_client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, choice: str
) -> None:
    says(engine, ids_of, TGI_PARIS)
    response = await chat(strict_client, tool_choice=choice)
    assert response.json()["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "0",
                        "type": "function",
                        "function": {"description": None, "name": "get_weather", "arguments": '{"city":"Paris"}'},
                    }
                ],
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert '"description":null,"name"' in response.text
    assert engine.requests[0].grammar is not None


async def test_arguments_as_tgi_writes_them(
    strict_client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf
) -> None:
    says(engine, ids_of, '{"function": {"_name": "get_weather", "city": "Orl\\u00e9ans", "near": [1, 2.0]}}')
    message = (await chat(strict_client)).json()["choices"][0]["message"]
    assert names_and_arguments(message) == [("get_weather", '{"city":"Orléans","near":[1,2.0]}')]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_no_tool_has_a_run_of_its_own(
    strict_client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, is_stream: bool
) -> None:
    says(engine, ids_of, TGI_NO_TOOL, "It rains.")
    if is_stream:
        *chunks, last = await stream(strict_client, stream_options={"include_usage": True}, max_tokens=40)
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "It rains."
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        usage = last["usage"]
    else:
        answer = (await chat(strict_client, max_tokens=40)).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": "It rains."}
        usage = answer["usage"]
    first, second = engine.requests
    assert first.grammar is not None and second.grammar is None
    assert second.max_new_tokens == 40
    assert len(second.prompt_token_ids) < len(first.prompt_token_ids)
    assert usage["prompt_tokens"] == len(second.prompt_token_ids)
    assert usage["completion_tokens"] == len(ids_of("It rains.")) + 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"function": {"_name": "get_weather", "ci', "Input data was truncated"),
        ("{}", "Object missing required field `function`"),
        ('{"function": {}}', "missing field `_name`"),
    ],
)
async def test_text_that_tgi_cannot_parse(
    strict_client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, text: str, why: str
) -> None:
    says(engine, ids_of, text, reason=FinishReason.LENGTH)
    response = await chat(strict_client)
    assert response.status_code == 422
    assert response.json() == {
        "error": f"Tool error: Failed to parse generated text: {why} {json.dumps(text)}",
        "error_type": "tool_error",
    }


@pytest.mark.parametrize(
    ("ids", "told"),
    [([], "0"), (["0", "7", "3"], "8"), (["0", "call_1"], None), (["9" * 20], None)],
    ids=["none", "numbers", "other", "too long"],
)
async def test_call_as_tgi_streams(
    strict_client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, ids: list[str], told: str | None
) -> None:
    says(engine, ids_of, TGI_PARIS)
    calls = [{"id": id, "type": "function", "function": {"name": "clock", "arguments": {}}} for id in ids]
    past = [{"role": "assistant", "tool_calls": calls}] if calls else []
    chunks = await stream(strict_client, messages=[*past, USER])
    *deltas, last = [chunk["choices"][0] for chunk in chunks]
    assert last["delta"] == {"role": "assistant", "content": ""}
    assert last["finish_reason"] == "stop"
    told_calls = [delta["delta"]["tool_calls"][0] for delta in deltas]
    assert all(delta["delta"].keys() == {"role", "tool_calls"} for delta in deltas)
    assert all(delta["finish_reason"] is None for delta in deltas)
    assert told_calls[0]["function"] == {"name": "get_weather", "arguments": "{"}
    assert all(call["function"]["name"] is None for call in told_calls[1:])
    assert json.loads("".join(call["function"]["arguments"] for call in told_calls)) == {"city": "Paris"}
    (id_told,) = {call["id"] for call in told_calls}
    assert id_told == told if told else re.fullmatch("[0-9a-f-]{36}", id_told)


async def test_stream_as_tgi_that_is_cut_off(
    strict_client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf
) -> None:
    says(engine, ids_of, '{"functi', reason=FinishReason.LENGTH)
    (chunk,) = await stream(strict_client)
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunk["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("tools", [{}, {"tools": []}], ids=["none", "empty"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_a_call_of_no_tool_cannot_be_required(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, tools: dict[str, Any], choice: Any
) -> None:
    body = {"messages": [USER], "tool_choice": choice, **tools}
    answer = await client.post(PATH, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert "there are no `tools`" in answer.json()["error"]["message"]
    assert (await strict_client.post(PATH, json=body)).status_code == 200


async def test_a_chat_has_messages(client: httpx.AsyncClient) -> None:
    for path, body in ((PATH, {}), ("/v1/messages", {"max_tokens": 5})):
        answer = await client.post(path, json={"messages": []} | body)
        assert answer.status_code == 400 and "there are no messages" in answer.json()["error"]["message"]
