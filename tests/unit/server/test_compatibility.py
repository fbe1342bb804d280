"""A test for each row of docs/compatibility.md, by default and with --strict-tgi."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from engine.link.messages import EngineStats, FinishReason, StepOutput, StepReport
from server.app import create_app
from server.chat.template import ChatTemplate
from server.launcher.args import parse_args
from server.telemetry.metrics import Metrics
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import LIMITS, FakeEngine, chat_format_of, client_of, events_of, make_config, one_by_one

REPOSITORY = Path(__file__).resolve().parents[3]
DOCUMENT = REPOSITORY / "docs" / "compatibility.md"
TESTED_ELSEWHERE = {
    34: ("tests/contract/test_sampling_parameters.py", "test_company_and_preemption_change_nothing"),
    37: ("tests/e2e/test_life_cycle.py", "test_port_of_strict_tgi_is_closed_until_ready"),
}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "hey"}]

IdsOf = Callable[[str], list[int]]


@pytest.fixture(params=[False, True], ids=["default", "strict"])
def strict(request: pytest.FixtureRequest) -> bool:
    is_strict: bool = request.param
    return is_strict


@pytest.fixture
def http(strict: bool, client: httpx.AsyncClient, strict_client: httpx.AsyncClient) -> httpx.AsyncClient:
    """A client of the application in either mode."""
    return strict_client if strict else client


async def generate(http: httpx.AsyncClient, path: str = "/generate", **parameters: Any) -> httpx.Response:
    return await http.post(path, json={"inputs": "x", "parameters": parameters})


async def chat(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.post(CHAT, json={"messages": USER} | body)


def message_of(response: httpx.Response, strict: bool) -> str:
    """The text of an error on a /v1 route."""
    error = response.json()["error"]
    text: str = error if strict else error["message"]
    return text


def test_each_row_is_documented_and_tested() -> None:
    """The document has its 38 rows in order; each has a test, here or where there is an engine."""
    rows = re.findall(r"^\| (\d+) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 39))
    tested = {int(name.split("_")[2]) for name in globals() if name.startswith("test_row_")}
    assert tested | set(TESTED_ELSEWHERE) == set(range(1, 39))
    for module, test in TESTED_ELSEWHERE.values():
        assert f"def {test}(" in (REPOSITORY / module).read_text()


async def test_row_1_no_parameters_means_sampling(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await http.post("/generate", json={"inputs": "x"})
    await http.post("/generate", json={"inputs": "x", "parameters": {}})
    assert [request.sampling.seed is None for request in engine.requests] == [False, True]


async def test_row_2_the_root_answers_with_an_array_and_the_prompt(http: httpx.AsyncClient) -> None:
    assert (await generate(http, "/")).json() == [{"generated_text": "xHello, world!"}]


async def test_row_3_top_p_of_one(http: httpx.AsyncClient, strict: bool) -> None:
    for name in ("top_p", "typical_p"):
        assert (await generate(http, **{name: 1.0})).status_code == 422
    response = await chat(http, top_p=1)
    assert response.status_code == (422 if strict else 200)


async def test_row_4_a_chat_samples_unless_the_temperature_is_zero(
    http: httpx.AsyncClient, strict: bool, engine: FakeEngine
) -> None:
    await chat(http)
    await chat(http, temperature=0)
    await chat(http, temperature=0, top_p=0.5)
    assert [request.sampling.seed is None for request in engine.requests] == [False, True, not strict]
    assert (await generate(http, temperature=0)).status_code == 422


async def test_row_5_presence_penalty(http: httpx.AsyncClient, strict: bool, engine: FakeEngine) -> None:
    await chat(http, presence_penalty=0.5)
    sampling = engine.requests[0].sampling
    penalties = (sampling.repetition_penalty, sampling.presence_penalty)
    assert penalties == ((2.5, 0.0) if strict else (1.0, 0.5))
    assert (await chat(http, presence_penalty=-2)).status_code == (422 if strict else 200)


async def test_row_6_finish_reason_of_a_stop_string(http: httpx.AsyncClient, strict: bool) -> None:
    expected = "stop_sequence" if strict else "stop"
    assert (await chat(http, stop=["wor"])).json()["choices"][0]["finish_reason"] == expected
    completion = await http.post(COMPLETIONS, json={"prompt": "x", "stop": ["wor"]})
    assert completion.json()["choices"][0]["finish_reason"] == expected
    assert (await generate(http, stop=["wor"], details=True)).json()["details"]["finish_reason"] == "stop_sequence"


async def test_row_7_completion_chunks(http: httpx.AsyncClient, strict: bool) -> None:
    response = await http.post(COMPLETIONS, json={"prompt": "x", "stream": True})
    choices = [event["choices"][0] for event in events_of(response.content)]
    assert choices[0]["finish_reason"] == ("" if strict else None)
    last = (choices[-1]["text"], choices[-1]["finish_reason"])
    assert last == (("<|im_end|>", "eos_token") if strict else ("", "stop"))


async def test_row_8_stop_strings_in_the_text(http: httpx.AsyncClient, strict: bool) -> None:
    """Found also in the middle of a token; OpenAI's routes leave it out, native ones keep it."""
    assert (await generate(http, stop=["wor"])).json()["generated_text"] == "Hello, wor"
    content = (await chat(http, stop=["wor"])).json()["choices"][0]["message"]["content"]
    assert content == ("Hello, wor" if strict else "Hello, ")
    chunks = events_of((await chat(http, stop=["world!?", "o, w"], stream=True)).content)
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == ("Hello, w" if strict else "Hell")


async def test_row_9_length_wins(http: httpx.AsyncClient, strict: bool, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.events = one_by_one(ids_of("Hello, world!"), FinishReason.LENGTH)
    details = (await generate(http, stop=["!"], details=True)).json()["details"]
    assert details["finish_reason"] == "length"
    choice = (await chat(http, stop=["!"])).json()["choices"][0]
    expected = ("Hello, world!", "length") if strict else ("Hello, world", "stop")
    assert (choice["message"]["content"], choice["finish_reason"]) == expected


async def test_row_10_errors_of_streams(http: httpx.AsyncClient, strict: bool) -> None:
    native = await generate(http, "/generate_stream", temperature=0)
    assert (native.status_code, list(events_of(native.content)[0])) == (200, ["error", "error_type"])
    openai = await chat(http, temperature=-1, stream=True)
    if strict:
        error = events_of(openai.content)[0]["error"]
        assert (openai.status_code, list(error)) == (200, ["message", "http_status_code"])
        assert openai.content.endswith(b"data: [DONE]\n\n")
    else:
        assert openai.status_code == 400


async def test_row_11_error_objects(http: httpx.AsyncClient, strict: bool) -> None:
    error = (await chat(http, temperature=-1)).json()
    text = "Input validation error: `temperature` must be strictly positive"
    if strict:
        assert error == {"error": text, "error_type": "validation"}
    else:
        expected = {"type": "invalid_request_error", "code": "decimal_below_min_value", "param": "temperature"}
        assert error == {"error": {"message": "Input validation error: `temperature` must be >= 0.0"} | expected}
    assert (await generate(http, temperature=0)).json() == {"error": text, "error_type": "validation"}


async def test_row_12_malformed_bodies(http: httpx.AsyncClient, strict: bool) -> None:
    for path in ("/generate", CHAT):
        is_openai = path == CHAT and not strict
        for content, content_type, status in (
            (b"{", "application/json", 400),
            (b"{}", "application/json", 400 if is_openai else 422),
            (b"{}", "text/plain", 415),
        ):
            response = await http.post(path, content=content, headers={"content-type": content_type})
            assert response.status_code == status
            if is_openai:
                assert response.json()["error"]["type"] == "invalid_request_error"
            else:
                assert response.headers["content-type"] == "text/plain; charset=utf-8"


async def test_row_13_a_cut_character_does_not_empty_the_text(
    http: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf
) -> None:
    ids = ids_of("ok 龘")
    engine.script.events = one_by_one(ids[:-1], FinishReason.LENGTH)
    assert (await generate(http)).json()["generated_text"] == "ok "


async def budget_of(http: httpx.AsyncClient, engine: FakeEngine, asked: int) -> int:
    """What reaches the engine on a server with a window of 2,048."""
    engine.limits_now = msgspec.structs.replace(engine.limits_now, max_input_tokens=2047, max_total_tokens=2048)
    assert (await generate(http, max_new_tokens=asked)).status_code == 200
    return engine.requests[-1].max_new_tokens


async def test_row_14_more_than_1024_tokens(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert await budget_of(http, engine, 1500) == 1500


async def test_row_15_more_than_the_window(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert await budget_of(http, engine, 100_000) == 2047


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
GRAMMAR = {"type": "regex", "value": "a"}


async def test_row_16_tools_beside_a_format(http: httpx.AsyncClient, strict: bool, engine: FakeEngine) -> None:
    assert (await chat(http, tools=[])).json()["choices"][0]["message"]["content"] == "Hello, world!"
    assert engine.requests[0].grammar is None
    for tools in ([], [TOOL]):
        response = await chat(http, tools=tools, response_format=GRAMMAR)
        assert response.status_code == (422 if strict else 200)
        if strict:
            assert message_of(response, strict) == "Tool error: Grammar and tools are mutually exclusive"


SAYS_CALL = {
    False: '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    True: '{"function": {"_name": "get_weather", "city": "Paris"}}',
}
"""What the model writes to call, by mode."""


def says_call(engine: FakeEngine, ids_of: IdsOf, strict: bool) -> None:
    engine.script.events = one_by_one(ids_of(SAYS_CALL[strict] + "<|im_end|>"))


async def test_row_17_tools_in_the_template(
    http: httpx.AsyncClient, strict: bool, engine: FakeEngine, ids_of: IdsOf, tokenizer: TextTokenizer
) -> None:
    says_call(engine, ids_of, strict)
    await chat(http, tools=[TOOL])
    prompt = tokenizer.decode(engine.requests[0].prompt_token_ids)
    assert ('"parameters": {"type": "object", "properties"' in prompt) != strict
    assert ('"arguments":"{\\"type\\":\\"object\\",\\"properties\\"' in prompt) == strict


async def test_row_18_the_model_wants_no_tool(
    http: httpx.AsyncClient, strict: bool, engine: FakeEngine, ids_of: IdsOf
) -> None:
    first = one_by_one(ids_of('{"function": {"_name": "no_tool"}}'), FinishReason.LENGTH)
    engine.script.scripts = [first] if strict else []
    answer = (await chat(http, tools=[TOOL], logprobs=True)).json()
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello, world!", "stop")
    assert (len(choice["logprobs"]["content"]), answer["usage"]["completion_tokens"]) == (5, 5)
    assert [request.grammar is None for request in engine.requests] == ([False, True] if strict else [True])


async def test_row_19_a_streamed_call_has_an_end(
    http: httpx.AsyncClient, strict: bool, engine: FakeEngine, ids_of: IdsOf
) -> None:
    says_call(engine, ids_of, strict)
    *calls, last = events_of((await chat(http, tools=[TOOL], stream=True)).content)
    assert last["choices"][0]["finish_reason"] == ("stop" if strict else "tool_calls")
    parts = [chunk["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] for chunk in calls]
    assert "".join(parts) == '{"city": "Paris"}'


async def test_row_20_ids_of_calls(http: httpx.AsyncClient, strict: bool, engine: FakeEngine, ids_of: IdsOf) -> None:
    says_call(engine, ids_of, strict)
    answers = [(await chat(http, tools=[TOOL])).json() for _ in range(2)]
    ids = [answer["choices"][0]["message"]["tool_calls"][0]["id"] for answer in answers]
    assert ids == ["0", "0"] if strict else len({id for id in ids if id.startswith("call_")}) == 2


async def test_row_21_content_beside_calls(
    http: httpx.AsyncClient, strict: bool, engine: FakeEngine, ids_of: IdsOf
) -> None:
    says_call(engine, ids_of, strict)
    message = (await chat(http, tools=[TOOL])).json()["choices"][0]["message"]
    assert list(message) == (["role", "tool_calls"] if strict else ["role", "content", "tool_calls"])
    assert message.get("content") is None
    assert list((await chat(http)).json()["choices"][0]["message"]) == ["role", "content"]


async def test_row_22_ids_and_model_time(http: httpx.AsyncClient, strict: bool) -> None:
    ids = [(await chat(http)).json()["id"] for _ in range(2)]
    ids += [(await http.post(COMPLETIONS, json={"prompt": "x"})).json()["id"] for _ in range(2)]
    created = (await http.get("/v1/models")).json()["data"][0]["created"]
    if strict:
        assert (ids, created) == ([""] * 4, 0)
    else:
        assert len(set(ids)) == 4
        assert created > 1_700_000_000
        stream = events_of((await chat(http, stream=True)).content)
        assert len({chunk["id"] for chunk in stream}) == 1


async def test_row_23_choices_are_in_order(http: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.scripts = [one_by_one(ids_of("Hello, world!<|im_end|>")), one_by_one(ids_of("<|im_end|>"))]
    choices = (await http.post(COMPLETIONS, json={"prompt": ["a", "b"]})).json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "Hello, world!"), (1, "")]


async def test_row_24_a_request_counts_once(http: httpx.AsyncClient) -> None:
    await chat(http)
    await generate(http, best_of=2, do_sample=True)
    assert "\ntgi_request_count 2\n" in (await http.get("/metrics")).text


def test_row_25_skipped_tokens_and_the_batch_limit(strict: bool) -> None:
    metrics = Metrics(LIMITS, is_strict=strict)
    report = StepReport(num_sequences=1, num_draft_hits=[2])
    metrics.observe_output(StepOutput(events=[], stats=EngineStats(), reports=[report]), 0.001)
    text = metrics.render(EngineStats())
    assert "# TYPE tgi_request_skipped_tokens summary\n" in text
    assert ("tgi_batch_max_total_tokens" in text) is not strict


async def test_row_26_any_model_name_is_served(http: httpx.AsyncClient) -> None:
    answer = await chat(http, model="no/such")
    assert (answer.status_code, answer.json()["model"]) == (200, "no/such")
    assert (await generate(http, adapter_id="no/such")).status_code == 200


@pytest.mark.parametrize(("key", "status"), [("Bearer Key", 200), ("bearer Key", 200), ("Bearer key", 401)])
async def test_row_27_the_key_is_compared_exactly(
    engine: FakeEngine, model_folder: Path, strict: bool, key: str, status: int
) -> None:
    tokenizer = TextTokenizer.from_folder(str(model_folder), 1)
    async with client_of(create_app(engine, make_config(api_key="Key", is_strict_tgi=strict), tokenizer)) as http:
        response = await http.post("/generate", json={"inputs": "x"}, headers={"authorization": key})
    assert response.status_code == status


async def test_row_28_the_prompt_of_a_chat_needs_the_key(engine: FakeEngine, model_folder: Path, strict: bool) -> None:
    tokenizer = TextTokenizer.from_folder(str(model_folder), 1)
    async with client_of(create_app(engine, make_config(api_key="Key", is_strict_tgi=strict), tokenizer)) as http:
        assert (await http.post("/chat_tokenize", json={"messages": USER})).status_code == (200 if strict else 401)
        assert (await http.post("/tokenize", json={"inputs": "x"})).status_code == 401


async def test_row_29_tokenize_speaks_of_bytes(http: httpx.AsyncClient, ids_of: IdsOf) -> None:
    text = "龘 Hello"
    tokens = (await http.post("/tokenize", json={"inputs": text, "parameters": {"truncate": 1}})).json()
    assert [token["id"] for token in tokens] == ids_of(text)
    assert (tokens[0]["start"], tokens[-1]["stop"]) == (0, len(text.encode()))


@pytest.mark.parametrize("strict", [False, True])
def test_row_30_json_in_templates(strict: bool) -> None:
    template = ChatTemplate(chat_format_of("{{ {'b': '<&>', 'a': [1, 2]} | tojson }}"), is_strict=strict)
    rendered = '{"a":[1,2],"b":"\\u003c\\u0026\\u003e"}' if strict else '{"b": "<&>", "a": [1, 2]}'
    assert template.render([]) == rendered


async def test_row_31_a_last_message_of_the_assistant_is_continued(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: TextTokenizer
) -> None:
    await http.post(CHAT, json={"messages": [*USER, {"role": "assistant", "content": "I say "}]})
    assert tokenizer.decode(engine.requests[0].prompt_token_ids).endswith("<|im_start|>assistant\nI say")


def test_row_32_the_port_of_the_metrics(strict: bool) -> None:
    args = ["--model-id", "m", "--prometheus-port", "1", *(["--strict-tgi"] if strict else [])]
    (warning,) = parse_args(args, {}).warnings
    assert warning.startswith("--prometheus-port has no effect: metrics are at /metrics")


async def test_row_33_prompt_logprobs(http: httpx.AsyncClient, strict: bool, engine: FakeEngine) -> None:
    details = (await generate(http, decoder_input_details=True)).json()["details"]
    assert details["prefill"] == ([] if strict else [{"id": 90, "text": "x", "logprob": None}])
    assert engine.requests[0].has_prompt_logprobs != strict


async def test_row_35_the_seed_of_a_greedy_answer_is_null(http: httpx.AsyncClient) -> None:
    assert (await generate(http, seed=5, details=True)).json()["details"]["seed"] is None
    sampled = await generate(http, seed=5, do_sample=True, details=True)
    assert sampled.json()["details"]["seed"] == 5


async def test_row_36_units_of_the_time_headers(http: httpx.AsyncClient) -> None:
    headers = (await generate(http)).headers
    assert "." in headers["x-compute-time"]
    names = ("x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token")
    assert all(headers[name].isdecimal() for name in names)
    completion = await http.post(COMPLETIONS, json={"prompt": "x"})
    assert "x-compute-time" not in completion.headers
    assert completion.headers["x-total-time"].isdecimal()


async def test_row_38_preflights(http: httpx.AsyncClient, strict: bool) -> None:
    asked = "authorization, content-type"
    for path in ("/generate", "/no/such"):
        response = await http.options(path, headers={"access-control-request-headers": asked})
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["access-control-allow-methods"] == "GET,POST"
        assert response.headers["access-control-allow-headers"] == ("content-type" if strict else asked)
