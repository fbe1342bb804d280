"""Texts of an attacker run nothing in the pages, whoever says them: the model, a name, an error, a call's arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import hostile
from tests.browser.browser import watched_page
from tests.browser.pages_server import PagesServer, pages_server
from tests.browser.playground import Playground

MAX_PARSE_MS = 3_000
"""Ten times what the longest one takes, as others may use the cores. Careless patterns took 8 s to minutes."""


@pytest.mark.parametrize("text", hostile.TEXTS)
def test_an_answer_that_comes_character_by_character(playground: Playground, server: PagesServer, text: str) -> None:
    """Every beginning of the text is shown for a while."""
    server.engine.answers = [text]
    server.engine.step_s = 0.004
    playground.chat("Attack me.")
    assert playground.faults() == []


def test_an_answer_as_thought_json_and_completion(playground: Playground, server: PagesServer) -> None:
    attack = "\n\n".join(hostile.TEXTS)
    server.engine.step_s = 0
    playground.show_settings()
    server.engine.answers = [f"<think>\n{attack}\n</think>\n\n{attack}", json.dumps({"name": attack, "age": 1}), attack]
    playground.chat("Attack me.").get_by_text("Reasoning", exact=True).click()
    assert playground.faults() == []
    playground.answer_format.select_option("json_object")
    playground.chat("Attack me.")
    assert playground.faults() == []
    playground.tab("Completion").click()
    playground.complete("Attack me.").get_by_role("option").nth(3).hover()
    assert playground.faults() == []


def test_calls_of_tools_with_hostile_names_and_arguments(playground: Playground, server: PagesServer) -> None:
    attack = " ".join(hostile.TEXTS)
    playground.show_settings()
    tool = {"name": "f", "description": attack, "parameters": {"type": "object", "properties": {}}}
    playground.tools.fill(json.dumps(tool))
    call = json.dumps({"name": "f", "arguments": {"x": attack, attack: 1}})
    server.engine.answers = [f"<tool_call>\n{call}\n</tool_call>"]
    answer = playground.chat("Attack me.")
    expect(answer).to_contain_text("Calls f")
    assert playground.faults() == []
    answer.get_by_role("textbox", name="Answer of f").fill(attack)
    answer.get_by_role("button", name="Send answer").click()
    playground.settled()
    assert playground.faults() == []


def test_a_persons_own_words_become_titles_and_questions(playground: Playground) -> None:
    for text in hostile.HTML[:6]:
        playground.new_conversation.click()
        playground.chat(text)
        expect(playground.questions.last).to_contain_text(text)
    playground.page.reload()
    expect(playground.questions).to_have_count(1)
    assert playground.faults() == []


@pytest.mark.parametrize("text", hostile.HTML[:4])
def test_errors_of_the_server(playground: Playground, server: PagesServer, text: str) -> None:
    server.engine.error = f"no: {text}"
    playground.chat("Fail.")
    expect(playground.alert).to_contain_text(text)
    assert playground.faults() == []


def test_names_of_the_model(browser: Browser, tmp_path: Path) -> None:
    attack = "".join(hostile.HTML[:6])
    with (
        pages_server(tmp_path, model_id=attack, served_model_names=(attack,)) as server,
        watched_page(browser, server.url) as (page, _),
    ):
        playground = Playground.open(page)
        expect(playground.server).to_contain_text("<script>")
        playground.chat("Who are you?")
        assert playground.faults() == []


def test_conversations_that_somebody_else_has_put_into_the_storage(playground: Playground) -> None:
    """Another program of the origin, or an older page: what is kept is checked and shown as text."""
    attack = "".join(hostile.HTML)
    turns = [{"role": "user", "text": attack}, {"role": "assistant", "text": attack, "reasoning": attack, "calls": []}]
    kept = {"id": "1-2", "changed": 1, "turns": turns, "draft": attack, "settings": {"system": attack}}
    broken = [{"role": attack}, {"role": "user"}, {"role": "assistant", "text": attack}, {"role": "tool"}, None]
    others = [{**kept, "id": f"2-{number}", "turns": [turn]} for number, turn in enumerate(broken)]
    for number, value in enumerate([kept, {"turns": 5}, [], None, *others]):
        pair = [f"pytgi/conversation/{number}", json.dumps(value)]
        playground.page.evaluate("([name, value]) => localStorage.setItem(name, value)", pair)
    playground.page.evaluate("localStorage.setItem('pytgi/conversation/x', '{')")
    playground.page.reload()
    expect(playground.send).to_be_visible()
    playground.new_conversation.click()
    playground.chat("Is all well?")
    assert playground.faults() == []


@pytest.mark.parametrize("name", hostile.LONG)
def test_no_text_takes_the_parsers_long(playground: Playground, name: str) -> None:
    took_ms = playground.page.evaluate(
        """async (text) => {
            const { showMarkdown } = await import("./ui/markdown_view.js");
            const started = performance.now();
            showMarkdown(document.createElement("div"), text);
            return performance.now() - started;
        }""",
        hostile.LONG[name],
    )
    assert took_ms < MAX_PARSE_MS
