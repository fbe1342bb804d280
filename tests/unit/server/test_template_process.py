"""Templates that do not end, or want all memory, cost their own chat and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.app import create_app
from server.chat.renderer import ChatRenderer
from server.chat.rendering import Chat, RenderingError, TemplateConfig
from server.chat.template import ChatTemplate, template_config
from server.chat.template_process import TemplateProcess
from server.errors import TemplateError
from server.requests.openai import ChatRequest
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import CHATML, FakeEngine, chat_format_of, client_of, make_config, write_model_folder

QWEN2_5 = Path(__file__).with_name("qwen2_5.jinja").read_text()
FIX = "invalid operation: the template takes too long or too much memory"


def chat(text: str = "Hello") -> Chat:
    return Chat(messages=[{"role": "user", "content": text}])


@pytest.fixture
def processes() -> Iterator[list[TemplateProcess]]:
    made: list[TemplateProcess] = []
    yield made
    for process in made:
        process.close()


def process_for(source: str, processes: list[TemplateProcess], timeout_s: float = 0.5) -> TemplateProcess:
    config = TemplateConfig(templates={"default": source}, special_tokens={}, is_strict=False)
    process = TemplateProcess(config, timeout_s=timeout_s)
    processes.append(process)
    return process


@pytest.fixture(scope="module")
def neighbour() -> Iterator[TemplateProcess]:
    """A process for another template, which is there all the time."""
    made: list[TemplateProcess] = []
    yield process_for("fine", made, 10.0)
    made[0].close()


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) if a > 1 %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
    "{{ messages | tojson(indent=2000000000) }}",
    "{{ 'a' * 20000000000 }}",
    "{{ 'a'.ljust(20000000000) }}",
    "{{ 'a' | center(20000000000) }}",
    "{{ '%20000000000d' % 1 }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(90) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "{{ (range(99999) | list | tojson) | replace('1', 'x' * 99999) }}",
    "{{ lipsum(n=99999999) }}",
]


@pytest.mark.parametrize("source", ENDLESS, ids=range(len(ENDLESS)))
@pytest.mark.timeout(30)
def test_a_template_without_end_is_one_error_in_time(
    source: str, processes: list[TemplateProcess], neighbour: TemplateProcess
) -> None:
    guarded = "{% if messages[0].content == 'attack' %}" + source + "{% else %}fine{% endif %}"
    process = process_for(guarded, processes)
    started = time.monotonic()
    with pytest.raises(RenderingError):
        process.render(chat("attack"))
    assert time.monotonic() - started < 5
    assert neighbour.render(chat()) == "fine"


def test_after_a_template_that_took_too_long_the_next_chat_is_rendered(processes: list[TemplateProcess]) -> None:
    process = process_for("{% if messages[0].content == 'attack' %}" + ENDLESS[0] + "{% endif %}fine", processes)
    for _ in range(2):
        with pytest.raises(RenderingError, match=FIX):
            process.render(chat("attack"))
        process.timeout_s = 10.0  # a new process may take a while on a busy machine
        assert process.render(chat()) == "fine"
        process.timeout_s = 0.5


def test_the_output_is_bounded(processes: list[TemplateProcess]) -> None:
    process = process_for("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", processes, 20.0)
    with pytest.raises(RenderingError, match="invalid operation: the prompt is longer than 16777216 characters"):
        process.render(chat())
    process = process_for("{% for i in range(16000) %}{{ 'é' * 1000 }}{% endfor %}", processes, 20.0)
    assert process.render(chat()) == "é" * 16_000_000


def test_a_process_that_was_killed_gives_way_to_a_new_one(processes: list[TemplateProcess]) -> None:
    process = process_for(CHATML, processes, 10.0)
    expected = process.render(chat())
    assert process.child is not None
    process.child.kill()
    process.child.wait()
    assert process.render(chat()) == expected


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"a": [1e22, 1.0, 12345678901234567890]}'},
}
REQUESTS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hällo 👩‍👩‍👧 \u2028 \x00 </script>"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b \n"}], "tools": [TOOL]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL, TOOL]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "tool", "content": "y"}]},
    {"messages": []},
    {"messages": [{"role": "user", "content": "x" * 1_000_000}]},
    {"messages": [{"role": "user", "content": f"message {number}"} for number in range(10_000)]},
]


@pytest.mark.parametrize("source", [CHATML, QWEN2_5, "{{ nothing.at.all }}", "{% if", "{{ raise_exception('no') }}"])
@pytest.mark.parametrize("is_strict", [False, True])
def test_the_process_renders_as_this_one_does(source: str, is_strict: bool, processes: list[TemplateProcess]) -> None:
    chat_format = chat_format_of(source, eos_token="<|im_end|>")
    config = template_config(chat_format, is_strict=is_strict)
    assert config is not None
    process = TemplateProcess(config, timeout_s=20.0)
    processes.append(process)
    here = ChatTemplate(chat_format, is_strict=is_strict)
    apart = ChatTemplate(chat_format, is_strict=is_strict, render=process.render)
    for request in REQUESTS:
        messages = ChatRequest.model_validate(request, context={"is_strict": False}).messages
        outcomes = []
        for template in (here, apart):
            try:
                outcomes.append(template.render(messages))
            except TemplateError as error:
                outcomes.append(f"error: {error}")
        assert outcomes[0] == outcomes[1]


async def test_the_event_loop_goes_on_beside_a_template_without_end() -> None:
    renderer = ChatRenderer(chat_format_of(ENDLESS[0]), is_strict=False, is_apart=True)
    assert renderer.process is not None
    renderer.process.timeout_s = 1.0
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}]}, context={"is_strict": False})
    task = asyncio.create_task(renderer.render(request.messages))
    gaps, last = [], time.monotonic()
    while not task.done():
        await asyncio.sleep(0.005)
        gaps.append(time.monotonic() - last)
        last = time.monotonic()
    with pytest.raises(TemplateError, match=FIX):
        await task
    assert len(gaps) > 20 and max(gaps) < 0.5
    renderer.close()


@pytest.mark.timeout(60)
async def test_a_server_with_such_a_template_refuses_chats_and_serves_the_rest(
    engine: FakeEngine, tmp_path: Path
) -> None:
    write_model_folder(tmp_path, ENDLESS[0])
    app = create_app(engine, make_config(is_rendering_here=False), TextTokenizer.from_folder(str(tmp_path), 1))
    app.state.service.chats.process.timeout_s = 1.0
    body = {"messages": [{"role": "user", "content": "a"}]}
    async with client_of(app) as client:
        chats = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(3)]
        await asyncio.sleep(0.2)
        for _ in range(5):
            started = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            assert (await client.post("/generate", json={"inputs": "Hello"})).status_code == 200
            assert time.monotonic() - started < 0.5
        for answer in await asyncio.gather(*chats):
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == f"Template error: {FIX}"
