"""POST /v1/completions (`docs/wire.md`, 1.11 and 3.5): as OpenAI has it, and with --strict-tgi as TGI."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from engine.link.messages import FinishReason
from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, ObligingEngine, client_of, events_of, make_config, one_by_one

IdsOf = Callable[[str], list[int]]


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "What"} | body)


async def choices(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await complete(client, **body)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


async def stream(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await complete(client, stream=True, **body)
    assert response.content.count(b"[DONE]") == 1
    assert response.content.endswith(b"data: [DONE]\n\n")
    return events_of(response.content)


def texts_of(events: list[dict[str, Any]]) -> dict[int, str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


async def error_of(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await complete(client, **body)
    assert response.status_code == 400
    return response.json()["error"]


async def test_plain_bytes(client: httpx.AsyncClient) -> None:
    response = await complete(client)
    answer = response.json()
    assert answer["id"].startswith("cmpl-")
    assert response.text == (
        f'{{"object":"text_completion","id":"{answer["id"]}","created":{answer["created"]},"model":"org/model",'
        '"system_fingerprint":"3.3.6-dev0-native","choices":[{"index":0,"text":"Hello, world!","logprobs":null,'
        '"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":5,"total_tokens":6,"prompt_tokens_details":{"cached_tokens":0}}}'
    )


async def test_plain_to_tgi(strict_client: httpx.AsyncClient) -> None:
    answer = (await complete(strict_client, model="any/name", n=2, echo=True, logprobs=1, best_of=7)).json()
    assert (answer["id"], answer["model"]) == ("", "org/model")
    assert answer["choices"] == [{"index": 0, "text": "Hello, world!", "logprobs": None, "finish_reason": "stop"}]


@pytest.mark.parametrize(("asked", "told"), [(None, "org/model"), ("tgi", "org/model"), ("any/name", "any/name")])
async def test_model_is_echoed(client: httpx.AsyncClient, asked: str | None, told: str) -> None:
    assert (await complete(client, model=asked)).json()["model"] == told


async def test_several_prompts(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.scripts = [one_by_one(ids_of(text + "<|im_end|>")) for text in ("one", "two words", "three")]
    response = await complete(client, prompt=["What", "What is", "x"])
    answer = response.json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "one"),
        (1, "two words"),
        (2, "three"),
    ]
    num_prompt = sum(len(ids_of(text)) for text in ("What", "What is", "x"))
    num_new = sum(len(ids_of(text + "<|im_end|>")) for text in ("one", "two words", "three"))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_choices_of_several_prompts(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    words = ["a", "b", "c", "d"]
    engine.script.scripts = [one_by_one(ids_of(word + "<|im_end|>")) for word in words]
    response = await complete(client, prompt=["What", "x"], n=2, temperature=1.0, seed=1)
    answer = response.json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(words))
    assert [request.sampling.seed for request in engine.requests] == [1, 2, 1, 2]
    usage = answer["usage"]
    assert [*usage.values()][:3] == [2, 8, 10], "a prompt counts once"


async def test_best_of_takes_the_likeliest(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.scripts = [
        one_by_one(ids_of("worse<|im_end|>"), logprob=-2.0),
        one_by_one(ids_of("better<|im_end|>"), logprob=-1.0),
    ]
    assert [choice["text"] for choice in await choices(client, best_of=2)] == ["better"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"n": 0}, "`n` must be > 0 and <= 128. Given: 0"),
        ({"n": 129}, "`n` must be > 0 and <= 128. Given: 129"),
        ({"n": 2, "best_of": 1}, "`best_of` must be >= `n`. Given: 1 and 2"),
        ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 2, "stream": True}, "`best_of` > `n` is not supported when streaming tokens"),
        ({"logprobs": 21}, "`logprobs` must be >= 0 and <= 20. Given: 21"),
        ({"temperature": -1}, "`temperature` must be >= 0.0"),
        ({"temperature": -1, "stream": True}, "`temperature` must be >= 0.0"),
        ({"prompt": ""}, "`prompt` cannot be empty"),
        ({"prompt": ["x", ""]}, "`prompt` cannot be empty"),
        ({"prompt": [10**6]}, "tokenizer error token 1000000 is not in the model's vocabulary"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], text: str) -> None:
    error = await error_of(client, **body)
    assert error["message"] == f"Input validation error: {text}"
    assert error["type"] == "invalid_request_error"
    assert error["param"] in ("prompt", *body)
    assert not engine.requests


SUFFIX = (
    "Input validation error: `suffix` needs a model that fills in the middle: this one does not have "
    "<|fim_prefix|>, <|fim_suffix|>, <|fim_middle|>",
    "suffix not supported",
)
TGI_TEXTS = {
    SUFFIX[0]: "Suffix is not supported and can be achieved by preprocessing the prompt.",
}
BATCH = ("Number of prompts exceeds the maximum allowed batch size of 128", "batch size exceeded")


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("body", "text", "kind"),
    [({"suffix": "x"}, *SUFFIX), ({"prompt": ["x"] * 129}, *BATCH)],
)
async def test_what_is_refused_before_a_stream(
    client: httpx.AsyncClient,
    strict_client: httpx.AsyncClient,
    is_stream: bool,
    body: dict[str, Any],
    text: str,
    kind: str,
) -> None:
    error = await error_of(client, stream=is_stream, **body)
    assert (error["message"], error["type"]) == (text, "invalid_request_error")
    tgi_text = TGI_TEXTS.get(text, text.replace("128", "4"))
    response = await complete(strict_client, stream=is_stream, **body)
    assert (response.status_code, response.json()) == (422, {"error": tgi_text, "error_type": kind})
    assert '\ntgi_request_failure{err="validation"} 1\n' in (await client.get("/metrics")).text


async def test_as_many_prompts_as_there_are_permits(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    answer = (await complete(client, prompt=["x"] * 128)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(128))
    assert answer["usage"]["prompt_tokens"] == 128
    assert (await complete(client, prompt=[[5]] * 100, stream=True)).status_code == 200
    assert len(engine.requests) == 228
    assert (await complete(strict_client, prompt=["x"] * 5)).status_code == 422


@pytest.mark.parametrize("is_stream", [False, True])
async def test_more_sequences_than_permits(client: httpx.AsyncClient, is_stream: bool) -> None:
    """A 429 would be sent again for ever."""
    error = await error_of(client, prompt=["x"] * 65, n=2, stream=is_stream)
    assert (error["param"], error["message"]) == (
        "n",
        "Input validation error: prompts times `n` must be <= 128. Given: 130",
    )
    assert (await complete(client, prompt=["x"] * 64, n=2, stream=is_stream)).status_code == 200


async def test_the_first_failure_fails_the_call(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.scripts = [one_by_one(ids_of("one<|im_end|>")), one_by_one([5], None)]
    engine.script.errors = [None, "boom"]
    response = await complete(client, prompt=["What", "x"])
    assert response.status_code == 424
    assert response.json()["error"]["message"] == "Request failed during generation: Server error: boom"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": []}, "prompt: Empty array detected. Do not use an empty array for the prompt."),
        ({"prompt": [1, 2]}, "prompt: data did not match any variant of untagged enum PromptDeserializer"),
        ({"stop": "x"}, 'stop: invalid type: string "x", expected a sequence'),
        ({"stream": None}, "stream: invalid type: null, expected a boolean"),
    ],
)
async def test_shapes_that_tgi_refuses(strict_client: httpx.AsyncClient, body: dict[str, Any], reason: str) -> None:
    response = await complete(strict_client, **body)
    assert response.status_code == 422
    assert response.text.startswith(f"Failed to deserialize the JSON body into the target type: {reason} at line 1")


@pytest.mark.parametrize("prompt", [[], [[]], [[1], []], ["x", 1], [["x"]], [-1], [1.0], None, {}])
async def test_shapes_that_nobody_takes(client: httpx.AsyncClient, prompt: Any) -> None:
    response = await complete(client, prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


async def test_null_is_the_default(client: httpx.AsyncClient) -> None:
    names = (
        "max_tokens",
        "stop",
        "stream",
        "suffix",
        "stream_options",
        "n",
        "best_of",
        "echo",
        "logprobs",
        "logit_bias",
    )
    assert (await complete(client, **dict.fromkeys(names))).status_code == 200


async def test_prompts_of_token_ids(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    first, second = ids_of("What is"), ids_of("你好")
    assert [choice["text"] for choice in await choices(client, prompt=first, echo=True)] == ["What isHello, world!"]
    response = await complete(client, prompt=[first, second])
    assert [request.prompt_token_ids for request in engine.requests] == [first, first, second]
    assert response.headers["x-compute-characters"] == str(len("What is你好"))


async def test_parameters_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(
        client,
        max_tokens=7,
        temperature=0.5,
        top_p=1,
        top_k=-1,
        min_p=0.25,
        typical_p=0.5,
        frequency_penalty=0.5,
        presence_penalty=0.75,
        repetition_penalty=1.5,
        logit_bias={"5": -2},
        ignore_eos=True,
        seed=9,
        logprobs=3,
    )
    (request,) = engine.requests
    sampling = request.sampling
    assert (request.max_new_tokens, request.is_ignoring_eos) == (7, True)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 1.0, 0)
    assert (sampling.min_p, sampling.typical_p, sampling.seed) == (0.25, 0.5, 9)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (0.5, 0.75, 1.5)
    assert (sampling.logit_bias, sampling.num_top_tokens) == ({5: -2.0}, 3)


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0, True), (None, False), (1.0, False)])
async def test_greedy_at_temperature_0(
    client: httpx.AsyncClient, engine: FakeEngine, temperature: float | None, is_greedy: bool
) -> None:
    await complete(client, temperature=temperature)
    assert (engine.requests[0].sampling.seed is None) == is_greedy


@pytest.mark.parametrize("stop", ["wor", ["wor"]])
async def test_stop_is_cut_off(client: httpx.AsyncClient, stop: Any) -> None:
    (choice,) = await choices(client, stop=stop)
    assert (choice["text"], choice["finish_reason"]) == ("Hello, ", "stop")


async def test_stop_is_kept_for_tgi(strict_client: httpx.AsyncClient) -> None:
    (choice,) = await choices(strict_client, stop=["wor"])
    assert (choice["text"], choice["finish_reason"]) == ("Hello, wor", "stop_sequence")


async def test_logprobs(client: httpx.AsyncClient, engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    for event in engine.script.events:
        event.top_token_ids, event.top_logprobs = [[5, 6]], [[-0.125, -0.25]]
    likeliest, second = tokenizer.decode([5]), tokenizer.decode([6])
    (choice,) = await choices(client, logprobs=2)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["Hello", ",", " world", "!", "<|im_end|>"]
    assert logprobs["token_logprobs"] == [-0.5] * 5
    assert logprobs["text_offset"] == [0, 5, 6, 12, 13]
    assert logprobs["top_logprobs"][0] == {second: -0.25, likeliest: -0.125, "Hello": -0.5}, "with the chosen one"


async def test_logprobs_of_the_chosen_tokens_alone(client: httpx.AsyncClient) -> None:
    (choice,) = await choices(client, logprobs=0)
    assert choice["logprobs"]["top_logprobs"] is None
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 5


async def test_a_character_of_several_tokens_is_one_in_the_offsets_of_an_echo(
    model_folder: Path, ids_of: IdsOf
) -> None:
    prompt = "a 龍 b"
    engine = ObligingEngine(ids_of("Hi<|im_end|>"))
    app = create_app(engine, make_config(), TextTokenizer.from_folder(str(model_folder), 1))
    async with client_of(app) as http:
        (choice,) = await choices(http, prompt=prompt, echo=True, logprobs=0)
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert sum(name.startswith("bytes:") for name in tokens) == 3
    assert offsets == sorted(offsets) and choice["text"] == prompt + "Hi"
    for offset, name in zip(offsets, tokens, strict=True):
        if not name.startswith("bytes:") and name != "<|im_end|>":
            assert choice["text"].startswith(name, offset)


async def test_echo_with_logprobs(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    prompt = ids_of("What is")
    assert len(prompt) == 2
    first = engine.script.events[0]
    first.prompt_logprobs = [-3.0]
    first.prompt_top_token_ids, first.prompt_top_logprobs = [ids_of("!")], [[-0.125]]
    (choice,) = await choices(client, prompt="What is", echo=True, logprobs=1)
    logprobs = choice["logprobs"]
    assert choice["text"] == "What isHello, world!"
    assert logprobs["tokens"][:3] == ["What", " is", "Hello"]
    assert logprobs["token_logprobs"][:3] == [None, -3.0, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {"!": -0.125, " is": -3.0}], "with the prompt's own token"
    assert logprobs["text_offset"] == [0, 4, 7, 12, 13, 19, 20]
    (request,) = engine.requests
    assert (request.has_prompt_logprobs, request.num_prompt_top_tokens) == (True, 1)


async def test_what_harnesses_send(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """A map for each token of the prompt but the first, by which they see whether it was the likeliest one."""
    first = engine.script.events[0]
    first.prompt_logprobs, first.prompt_top_token_ids, first.prompt_top_logprobs = (
        [-1.0, -2.0],
        [[6], [8]],
        [[-1.0]] * 2,
    )
    body = {"prompt": [[5, 6, 7]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    ((choice,), (scored,)) = [await choices(client, **body), await choices(client, **body | {"max_tokens": 0})]
    logprobs = choice["logprobs"]
    assert logprobs["top_logprobs"][0] is None
    maps = zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    is_greedy = [max(tops, key=tops.get) == token for token, tops in maps if tops]
    assert is_greedy[:2] == [True, False]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert scored["logprobs"][key] == logprobs[key][:3]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_no_new_token(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf, is_stream: bool) -> None:
    engine.script.events = one_by_one(ids_of("!"), FinishReason.LENGTH)
    body = {"prompt": ["What", "x"], "max_tokens": 0, "echo": True}
    if is_stream:
        events = await stream(client, **body, stream_options={"include_usage": True})
        texts = ["".join(c["text"] for event in events for c in event["choices"] if c["index"] == i) for i in (0, 1)]
        reasons = {c["finish_reason"] for event in events for c in event["choices"]}
        usage = events[-1]["usage"]
    else:
        answer = (await complete(client, **body)).json()
        texts = [choice["text"] for choice in answer["choices"]]
        reasons = {choice["finish_reason"] for choice in answer["choices"]} | {None}
        usage = answer["usage"]
    assert (texts, reasons) == (["What", "x"], {None, "length"})
    assert [*usage.values()][:3] == [2, 0, 2]
    assert [request.max_new_tokens for request in engine.requests] == [1, 1]


async def test_no_new_token_needs_an_echo(client: httpx.AsyncClient) -> None:
    error = await error_of(client, max_tokens=0)
    assert (error["param"], error["code"]) == ("max_tokens", "integer_below_min_value")


async def test_the_likeliest_tokens_of_a_prompt_have_a_limit(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.limits_now = msgspec.structs.replace(engine.limits_now, max_input_tokens=8_000, max_total_tokens=9_000)
    body = {"prompt": [[5] * 6_554], "echo": True, "max_tokens": 1}
    error = await error_of(client, **body, logprobs=20)
    assert error["param"] == "logprobs"
    assert "are more than 131072" in error["message"]
    assert not engine.requests


async def test_cached_tokens(client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """A prompt's once, however many choices it has."""
    engine.script.events[0].num_cached_tokens = 16
    usage = (await complete(client, prompt=["What", "x"], n=2)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}
    body = {"messages": [{"role": "user", "content": "hey"}], "n": 2}
    usage = (await client.post("/v1/chat/completions", json=body)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16}
    events = await stream(client, stream_options={"include_usage": True})
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    assert "prompt_tokens_details" not in (await complete(strict_client)).json()["usage"]


async def test_stream_bytes(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.events = one_by_one(ids_of("Hello<|im_end|>"))
    response = await complete(client, stream=True)
    first = events_of(response.content)[0]
    id_and_time = f'"id":"{first["id"]}","created":{first["created"]}'
    identity = '"model":"org/model","system_fingerprint":"3.3.6-dev0-native"'
    assert response.content.decode() == (
        f'data: {{"object":"text_completion",{id_and_time},'
        f'"choices":[{{"index":0,"text":"Hello","logprobs":null,"finish_reason":null}}],{identity}}}\n\n'
        f'data: {{"object":"text_completion",{id_and_time},{identity},'
        '"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_stream_to_tgi(strict_client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.events = one_by_one(ids_of("Hello<|im_end|>"))
    first, last = await stream(strict_client, stream_options={"include_usage": True})
    assert first["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": ""}]
    assert "usage" not in first
    assert last["choices"] == [{"index": 0, "text": "<|im_end|>", "logprobs": None, "finish_reason": "eos_token"}]
    assert last["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.EOS_TOKEN])
async def test_last_reason_of_a_stream_to_tgi(
    strict_client: httpx.AsyncClient, engine: FakeEngine, reason: FinishReason
) -> None:
    engine.script.events[-1].finish_reason = reason
    assert (await stream(strict_client))[-1]["choices"][0]["finish_reason"] == reason.value


async def test_stream_of_several(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    words = ["one", "two words", "three", "four"]
    engine.script.scripts = [one_by_one(ids_of(word + "<|im_end|>")) for word in words]
    engine.script.pause_s = 0.001
    events = await stream(client, prompt=["What", "x"], n=2)
    assert texts_of(events) == dict(enumerate(words))
    order = [event["choices"][0]["index"] for event in events]
    assert order != sorted(order), "they take turns"
    ends = [event["choices"][0]["index"] for event in events if event["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]
    assert len({event["id"] for event in events}) == 1


async def test_stream_with_usage(client: httpx.AsyncClient) -> None:
    *chunks, last = await stream(client, prompt=["What", "x"], stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert [*last["usage"].values()][:3] == [2, 10, 12]


async def test_stream_echoes_first(client: httpx.AsyncClient) -> None:
    events = await stream(client, prompt=["What", "x"], echo=True)
    assert texts_of(events) == {0: "WhatHello, world!", 1: "xHello, world!"}


async def test_stream_logprobs(client: httpx.AsyncClient) -> None:
    events = await stream(client, logprobs=0)
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events] == [[0], [5], [6], [12], [13]]
    assert events[-1]["choices"][0]["logprobs"]["tokens"] == ["<|im_end|>"]


async def test_stream_errors_to_tgi(strict_client: httpx.AsyncClient) -> None:
    response = await complete(strict_client, stream=True, temperature=-1)
    assert (response.status_code, response.content) == (
        200,
        b'data: {"error":{"message":"Input validation error: `temperature` must be strictly positive",'
        b'"http_status_code":422}}\n\ndata: [DONE]\n\n',
    )


async def test_stream_fails_midway(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.scripts = [one_by_one(ids_of("one<|im_end|>")), one_by_one([5], None)]
    engine.script.errors = [None, "boom"]
    events = await stream(client, prompt=["What", "x"])
    assert events[-1]["error"]["code"] == "generation"


@pytest.fixture
async def sdk(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def test_with_openai_client(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model="m", prompt=["What", "x"], n=2, logprobs=0, stop="never", echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[3].text == "xHello, world!"
    assert answer.usage is not None and answer.usage.prompt_tokens == 2
    chunks = await sdk.completions.create(model="m", prompt="x", stream=True, stream_options={"include_usage": True})
    received = [chunk async for chunk in chunks]
    assert "".join(chunk.choices[0].text for chunk in received[:-1]) == "Hello, world!"
    assert received[-2].choices[0].finish_reason == "stop"
    assert received[-1].usage is not None
    assert (await sdk.models.retrieve("org/model")).id == "org/model"
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("other")
