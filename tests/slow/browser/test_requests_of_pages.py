"""What the playground sends: parameters within their limits, tools, formats, completions; the same from a program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import expect

from engine.link.messages import GenerationRequest
from tests.browser.browser import Watch
from tests.browser.pages_server import MAX_TOTAL_TOKENS, PagesServer
from tests.browser.playground import Playground

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_every_parameter_reaches_the_engine(playground: Playground, server: PagesServer) -> None:
    playground.show_settings()
    values = {
        "temperature": "0.7",
        "top_p": "0.9",
        "max_tokens": "77",
        "seed": "5",
        "top_k": "11",
        "min_p": "0.1",
        "typical_p": "0.8",
        "repetition_penalty": "1.2",
        "frequency_penalty": "0.3",
        "presence_penalty": "0.4",
        "min_tokens": "2",
        "stop_token_ids": "42, 43",
        "logit_bias": '{"17": -5}',
        "stop": "never said",
    }
    for name, value in values.items():
        playground.setting(name).fill(value)
    playground.setting("ignore_eos").check()
    playground.chat("Hello")
    [request] = server.engine.requests
    sampling = request.sampling
    assert request.max_new_tokens == 77
    assert request.is_ignoring_eos
    assert {42, 43} <= set(request.stop_token_ids)
    assert (sampling.seed, sampling.top_k, sampling.min_tokens, sampling.logit_bias) == (5, 11, 2, {17: -5.0})
    fractions = "temperature top_p min_p typical_p repetition_penalty frequency_penalty presence_penalty".split()
    assert {name: getattr(sampling, name) for name in fractions} == {
        name: pytest.approx(float(values[name])) for name in fractions
    }


def test_a_reload_keeps_the_settings(playground: Playground) -> None:
    playground.setting("temperature").fill("0.7")
    playground.system_prompt.fill("Be brief.")
    playground.chat("Hello")
    playground.page.reload()
    expect(playground.setting("temperature")).to_have_value("0.7")
    expect(playground.system_prompt).to_have_value("Be brief.")


def test_limits_are_the_servers_own(playground: Playground, server: PagesServer) -> None:
    assert server.info()["max_total_tokens"] == MAX_TOTAL_TOKENS
    expect(playground.setting("max_tokens")).to_have_attribute("max", str(MAX_TOTAL_TOKENS))
    for name, value in (("temperature", "-1"), ("top_p", "1.5"), ("max_tokens", str(MAX_TOTAL_TOKENS + 1))):
        playground.setting(name).fill(value)
        playground.ask("Hello")
        expect(playground.settings.get_by_role("alert")).to_have_count(1)
        expect(playground.setting(name)).to_be_focused()
        playground.setting(name).fill("")
    assert server.engine.requests == []
    playground.page.keyboard.press("Tab")
    playground.send.click()
    playground.settled()
    assert len(server.engine.requests) == 1, "the message was kept while the settings were wrong"


def test_a_refusal_of_the_server_is_shown_in_its_words(playground: Playground, watch: Watch) -> None:
    playground.show_settings()
    playground.setting("logit_bias").fill('{"999999999": 1}')
    playground.ask("Hello")
    expect(playground.alert).to_contain_text("logit_bias")
    watch.forget("status of 4")


def test_a_tool_is_defined_called_and_answered(playground: Playground, server: PagesServer) -> None:
    playground.show_settings()
    playground.put_in_example("tools")
    server.engine.answers = [f"Let me look.\n{CALL}", "It is sunny in Paris."]
    answer = playground.chat("What is the weather in Paris?")
    assert "get_weather" in server.engine.prompt()
    expect(answer).to_contain_text("Calls get_weather")
    expect(answer.locator("pre")).to_contain_text('"city": "Paris"')
    answer.get_by_role("textbox", name="Answer of get_weather").fill('{"sky": "clear"}')
    answer.get_by_role("button", name="Send answer").click()
    playground.settled()
    expect(playground.answers.last).to_contain_text("It is sunny in Paris.")
    assert '<tool_response>\n{"sky": "clear"}\n</tool_response>' in server.engine.prompt()
    assert '"name": "get_weather"' in server.engine.prompt().rsplit("<tool_response>")[0]


def test_tools_that_are_no_json_are_told(playground: Playground, server: PagesServer) -> None:
    playground.show_settings()
    playground.tools.fill("{")
    playground.ask("Hello")
    expect(playground.settings.get_by_role("alert")).to_contain_text("not JSON")
    assert server.engine.requests == []


def test_an_answer_is_held_to_a_schema(playground: Playground, server: PagesServer) -> None:
    playground.show_settings()
    playground.answer_format.select_option("json_schema")
    playground.put_in_example("schema")
    server.engine.answers = ['{"name": "Ada", "age": 36}']
    answer = playground.chat("Who?")
    [request] = server.engine.requests
    assert request.grammar is not None and "age" in request.grammar
    assert json.loads(answer.locator("pre code").inner_text()) == {"name": "Ada", "age": 36}


# ---- completions ----


def test_a_completion_shows_how_likely_each_token_was(playground: Playground, server: PagesServer) -> None:
    playground.tab("Completion").click()
    server.engine.answers = [" blue because of light."]
    tokens = playground.complete("The sky is")
    assert server.engine.prompt() == "The sky is"
    assert server.engine.requests[-1].sampling.num_top_tokens == 5
    expect(tokens).to_have_text(" blue because of light.")
    tokens.get_by_role("option").first.hover()
    card = playground.page.get_by_role("group", name="Alternatives")
    expect(card).to_contain_text("60.7 %")  # exp(-0.5)
    expect(card).to_contain_text("22.3 %")  # exp(-1.5), an alternative
    expect(card.get_by_role("button")).to_have_count(4)


def test_the_model_goes_on_behind_another_token(playground: Playground, server: PagesServer) -> None:
    playground.tab("Completion").click()
    server.engine.answers = ["abc", "xyz"]
    tokens = playground.complete("The letters: ")
    tokens.get_by_role("option").nth(1).hover()
    other = playground.page.get_by_role("group", name="Alternatives").get_by_role("button").first
    [name] = re.findall("Go on with (.*), ", other.get_attribute("aria-label") or "")
    other.click()
    expect(tokens).to_have_text(f"a{name}xyz")
    assert server.engine.prompt() == f"The letters: a{name}"


def test_the_keyboard_tells_the_tokens_as_well(playground: Playground, server: PagesServer) -> None:
    playground.tab("Completion").click()
    server.engine.answers = ["abc"]
    tokens = playground.complete("The letters: ")
    tokens.focus()
    playground.page.keyboard.press("Home")
    playground.page.keyboard.press("ArrowRight")
    expect(tokens.get_by_role("option", selected=True)).to_have_accessible_name("b, 60.7 %")
    playground.page.keyboard.press("Escape")
    expect(playground.page.get_by_role("group", name="Alternatives")).not_to_be_visible()


def test_a_completion_is_stopped(playground: Playground, server: PagesServer) -> None:
    playground.tab("Completion").click()
    server.engine.answers = ["a long answer that nobody waits for"]
    server.engine.allow(3)
    playground.page.get_by_role("textbox", name="Prompt", exact=True).fill("The sky is")
    playground.button("Complete").click()
    playground.stop.click()
    server.until(lambda: server.engine.num_aborted == 1)
    expect(playground.button("Complete")).to_be_enabled()


def test_the_middle_is_filled_in(playground: Playground, server: PagesServer) -> None:
    playground.tab("Fill in the middle").click()
    server.engine.answers = ["return a"]
    middle = playground.fill_in("def add(a, b):\n    ", " + b\n")
    assert server.engine.prompt() == "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|> + b\n<|fim_middle|>"
    expect(middle).to_have_text("return a")


def test_a_line_break_is_a_token_to_point_at(playground: Playground, server: PagesServer) -> None:
    server.engine.answers = ["one\ntwo"]
    playground.tab("Completion").click()
    completion = playground.complete("Count")
    completion.get_by_role("option", name=re.compile("↵")).hover()
    expect(playground.page.get_by_role("group", name="Alternatives", exact=True)).to_contain_text("↵")


# ---- the same from a program ----


PROGRAMS = {
    "curl": ("request.sh", ["sh"]),
    "Python": ("request.py", [sys.executable]),
    "JavaScript": ("request.mjs", ["node"]),
}


def run_program(language: str, program: str, folder: Path) -> str:
    """Run what was copied; what it prints."""
    name, command = PROGRAMS[language]
    (folder / name).write_text(program)
    done = subprocess.run([*command, str(folder / name)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_id(request: GenerationRequest) -> GenerationRequest:
    return msgspec.structs.replace(request, request_id="")


QUESTION = 'Say "it\'s" $HOME \\n `x` ${y} %s\nsecond line: 你好, </script> \'\'\'""" !'


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
@pytest.mark.parametrize("mode", ["Chat", "Completion", "Fill in the middle"])
def test_what_is_copied_asks_exactly_the_same(
    playground: Playground, server: PagesServer, tmp_path: Path, language: str, mode: str
) -> None:
    playground.tab(mode).click()
    playground.show_settings()
    playground.setting("seed").fill("7")
    playground.setting("temperature").fill("0.5")
    playground.setting("top_k").fill("9")
    playground.setting("stop").fill("it's\n\\n\\n\\n")
    if mode == "Chat":
        playground.system_prompt.fill("Be 'brief'.")
        playground.put_in_example("tools")
        playground.message.fill(QUESTION)
        program = playground.copy_as(language)
        playground.send.click()
        playground.settled()
    elif mode == "Completion":
        playground.complete(QUESTION)
        program = playground.copy_as(language)
    else:
        playground.fill_in(QUESTION, QUESTION)
        program = playground.copy_as(language)
    assert "world" in run_program(language, program, tmp_path)
    ours, theirs = map(without_id, server.engine.requests)
    assert ours == theirs


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_a_copied_program_shows_calls_of_tools(
    playground: Playground, server: PagesServer, tmp_path: Path, language: str
) -> None:
    server.engine.answers = [CALL]
    playground.show_settings()
    playground.put_in_example("tools")
    playground.message.fill("What is the weather in Paris?")
    printed = run_program(language, playground.copy_as(language), tmp_path)
    assert "get_weather" in printed
    assert "Paris" in printed
