"""How hard the model is to think, in each route's words: variables of the chat template, if it has such switches."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.chat.template_traits import words_of
from server.requests import ignored
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import CHATML, FakeEngine, client_of, make_config, write_model_folder

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
USER = [{"role": "user", "content": "hey"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER},
    RESPONSES: {"input": "hey"},
    MESSAGES: {"messages": USER, "max_tokens": 5},
}
SWITCHES = "{{ enable_thinking | default('unsaid') }}|{{ reasoning_effort | default('unsaid') }}"


@contextlib.asynccontextmanager
async def client_with(
    engine: FakeEngine, folder: Path, template: str, **changes: Any
) -> AsyncIterator[httpx.AsyncClient]:
    write_model_folder(folder, template)
    tokenizer = TextTokenizer.from_folder(str(folder), 1)
    async with client_of(create_app(engine, make_config(**changes), tokenizer)) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "said", "prompt"),
    [
        (CHAT, {}, "unsaid|unsaid"),
        (CHAT, {"reasoning_effort": None}, "unsaid|unsaid"),
        (CHAT, {"reasoning_effort": "none"}, "False|none"),
        (CHAT, {"reasoning_effort": "low"}, "True|low"),
        (CHAT, {"reasoning_effort": "xhigh"}, "True|xhigh"),
        (CHAT, {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "True|none"),
        (CHAT, {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "True|high"),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}, "False|unsaid"),
        (RESPONSES, {}, "unsaid|unsaid"),
        (RESPONSES, {"reasoning": None}, "unsaid|unsaid"),
        (RESPONSES, {"reasoning": {"summary": "auto"}}, "unsaid|unsaid"),
        (RESPONSES, {"reasoning": {"effort": "none"}}, "False|none"),
        (RESPONSES, {"reasoning": {"effort": "high", "summary": "auto"}}, "True|high"),
        (MESSAGES, {}, "unsaid|unsaid"),
        (MESSAGES, {"thinking": {"type": "disabled"}}, "False|unsaid"),
        (MESSAGES, {"thinking": {"type": "adaptive"}}, "True|unsaid"),
        (MESSAGES, {"output_config": {"effort": "low"}}, "unsaid|low"),
        (MESSAGES, {"output_config": {"effort": "max"}, "thinking": {"type": "disabled"}}, "False|max"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_effort_goes_to_the_template(
    engine: FakeEngine, tokenizer: TextTokenizer, tmp_path: Path, path: str, said: Any, prompt: str, stream: bool
) -> None:
    async with client_with(engine, tmp_path, SWITCHES) as client:
        answer = await client.post(path, json=BODIES[path] | said | {"stream": stream})
        assert answer.status_code == 200, answer.text
    assert tokenizer.decode(engine.requests[0].prompt_token_ids) == prompt


@pytest.mark.parametrize(
    ("path", "said", "param"),
    [
        (CHAT, {"reasoning_effort": 5}, "reasoning_effort"),
        (RESPONSES, {"reasoning": "low"}, "reasoning"),
        (RESPONSES, {"reasoning": {"effort": 5}}, "reasoning.effort"),
        (MESSAGES, {"output_config": {"effort": 5}}, None),
    ],
)
async def test_what_is_no_effort(client: httpx.AsyncClient, path: str, said: Any, param: str | None) -> None:
    answer = await client.post(path, json=BODIES[path] | said)
    assert (answer.status_code, answer.json()["error"].get("param")) == (400, param)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHATML, ["enable_thinking", "reasoning_effort"]),
        ("{# enable_thinking, reasoning_effort #}" + CHATML, ["enable_thinking", "reasoning_effort"]),
        (CHATML + "{% if enable_thinking is false %}{% endif %}", ["reasoning_effort"]),
        (CHATML + SWITCHES, []),
    ],
)
async def test_the_log_tells_once_that_a_template_has_no_such_switch(
    engine: FakeEngine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    told: list[str],
) -> None:
    monkeypatch.setattr(ignored, "_lines", set())
    async with client_with(engine, tmp_path, template) as client:
        with caplog.at_level(logging.DEBUG, "server.requests.ignored"):
            for path, said in (
                (CHAT, {"reasoning_effort": "none"}),
                (RESPONSES, {"reasoning": {"effort": "low"}}),
                (MESSAGES, {"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}),
            ):
                assert (await client.post(path, json=BODIES[path] | said)).status_code == 200
    lines = [record.getMessage() for record in caplog.records if record.name == "server.requests.ignored"]
    shown = [f"a request has {name!r} for the chat template, which does not look at it" for name in told]
    assert sorted(lines) == shown


async def test_tgi_knows_no_effort(engine: FakeEngine, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    template = "{{ enable_thinking is defined }}{{ reasoning_effort is defined }}"
    async with client_with(engine, tmp_path, template, is_strict_tgi=True) as client:
        for effort in ("none", 5):
            answer = await client.post(CHAT, json={"messages": USER, "reasoning_effort": effort})
            assert answer.status_code == 200
    assert tokenizer.decode(engine.requests[0].prompt_token_ids) == "falsefalse"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ a }}{# b #}{{ c['d'] }}", {"a", "c", "d"}),
        ("{# a {# b #} c", {"c"}),
        ("a {# b", {"a"}),
        ("{#" * 300_000 + "a", set()),
    ],
)
def test_words_of_a_template(source: str, words: set[str]) -> None:
    assert words_of(source) == words
