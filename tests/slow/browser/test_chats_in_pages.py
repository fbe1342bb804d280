"""Chats in the playground: changed turns, several conversations, the system prompt, what an answer looks like."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.browser import watched_page
from tests.browser.pages_server import PagesServer
from tests.browser.playground import Playground

MARKDOWN = """# A title

Some *emphasis*, **more of it**, `code` and [a link](https://example.invalid/there).

1. one
2. two
   - inner

> quoted

| a | b |
|---|---|
| 1 | 2 |

```python
def double(x):  # twice
    return 2 * x
```

Tom & Jerry <b>not bold</b> 1 < 2
"""


def test_a_turn_that_is_edited_is_asked_again_without_what_followed(
    playground: Playground, server: PagesServer
) -> None:
    server.engine.answers = ["first answer", "second answer", "third answer"]
    playground.chat("first question")
    playground.chat("second question")
    playground.questions.first.get_by_role("button", name="Edit", exact=True).click()
    editor = playground.page.get_by_role("textbox", name="Edit message", exact=True)
    expect(editor).to_have_value("first question")
    editor.fill("better question")
    playground.button("Send again").click()
    playground.settled()
    expect(playground.questions).to_contain_text(["better question"])
    expect(playground.answers).to_contain_text(["third answer"])
    assert "better question" in server.engine.prompt()
    assert "first" not in server.engine.prompt()
    assert "second" not in server.engine.prompt()


def test_an_edit_that_is_given_up_changes_nothing(playground: Playground, server: PagesServer) -> None:
    playground.chat("a question")
    playground.questions.first.get_by_role("button", name="Edit", exact=True).click()
    playground.page.get_by_role("textbox", name="Edit message", exact=True).fill("another")
    playground.page.keyboard.press("Escape")
    expect(playground.questions).to_contain_text(["a question"])
    assert len(server.engine.requests) == 1


def test_regenerate_asks_the_same_again(playground: Playground, server: PagesServer) -> None:
    server.engine.answers = ["one answer", "another answer"]
    playground.chat("a question").get_by_role("button", name="Regenerate", exact=True).click()
    expect(playground.answers).to_contain_text(["another answer"])
    playground.settled()
    expect(playground.answers).to_have_count(1)
    first, second = server.engine.requests
    assert first.prompt_token_ids == second.prompt_token_ids


def test_the_model_sees_all_turns_and_the_system_prompt(playground: Playground, server: PagesServer) -> None:
    playground.show_settings()
    playground.system_prompt.fill("Be brief.")
    playground.chat("first question")
    playground.chat("second question")
    assert "<|im_start|>system\nBe brief.<|im_end|>" in server.engine.prompt()
    for words in ("first question", "Hello, world!", "second question"):
        assert words in server.engine.prompt()


def test_conversations_are_apart_and_can_be_deleted(playground: Playground, server: PagesServer) -> None:
    for name in ("alpha", "beta", "gamma"):
        playground.new_conversation.click()
        playground.chat(f"{name} question")
    titles = [playground.conversation(f"{name} question") for name in ("alpha", "beta", "gamma")]
    titles[1].click()
    expect(playground.questions).to_contain_text(["beta question"])
    playground.chat("and more")
    assert "alpha" not in server.engine.prompt()
    assert "beta question" in server.engine.prompt()
    playground.conversations.get_by_role("button", name="Delete alpha question", exact=True).click()
    expect(titles[0]).to_have_count(0)
    playground.page.reload()
    expect(titles[2]).to_be_visible()
    expect(titles[0]).to_have_count(0)
    expect(playground.questions).to_contain_text(["beta question", "and more"])


def test_another_tab_finds_the_conversation_and_another_profile_does_not(
    playground: Playground, browser: Browser, server: PagesServer
) -> None:
    playground.chat("a private question")
    second = Playground.open(playground.page.context.new_page())
    expect(second.conversation("a private question")).to_be_visible()
    second.page.close()
    with watched_page(browser, server.url) as (page, _):
        stranger = Playground.open(page)
        expect(stranger.conversation("a private question")).to_have_count(0)


def test_markdown_is_shown_and_html_is_text(playground: Playground, server: PagesServer) -> None:
    server.engine.answers = [MARKDOWN]
    answer = playground.chat("Show me everything.")
    expect(answer.get_by_role("heading", name="A title")).to_be_visible()
    expect(answer.get_by_role("list")).to_have_count(2)
    expect(answer.get_by_role("cell", name="2")).to_be_visible()
    expect(answer.get_by_role("blockquote")).to_have_text("quoted")
    expect(answer.get_by_role("link", name="a link")).to_have_attribute("href", "https://example.invalid/there")
    expect(answer.get_by_role("link", name="a link")).to_have_attribute("rel", re.compile("noopener.*noreferrer"))
    code = answer.locator("pre code")
    expect(code).to_have_text("def double(x):  # twice\n    return 2 * x")
    colors = code.locator("span").evaluate_all("(spans) => spans.map((span) => getComputedStyle(span).color)")
    assert len(set(colors)) >= 2, "keywords and comments look alike"
    expect(answer).to_contain_text("Tom & Jerry <b>not bold</b> 1 < 2")


def test_the_copy_button_of_code_copies_the_code(playground: Playground, server: PagesServer) -> None:
    server.engine.answers = [MARKDOWN]
    playground.chat("Show me code.").get_by_role("button", name="Copy code").click()
    assert playground.clipboard() == "def double(x):  # twice\n    return 2 * x"


@pytest.mark.parametrize("is_shown_before", [False, True])
def test_reasoning_is_folded(playground: Playground, server: PagesServer, is_shown_before: bool) -> None:
    """A person who unfolds it while it grows keeps it so."""
    server.engine.answers = ["<think>\nTwo and two make what?\n</think>\n\nFour."]
    server.engine.allow(14)
    playground.ask("What is 2 + 2?")
    answer = playground.answers.last
    thought = answer.get_by_text("Two and")
    reasoning = answer.get_by_text("Reasoning", exact=True)
    expect(reasoning).to_be_visible()
    expect(thought).not_to_be_visible()
    if is_shown_before:
        reasoning.click()
    server.engine.allow(None)
    playground.settled()
    expect(answer).to_contain_text("Four.")
    if not is_shown_before:
        reasoning.click()
    expect(thought).to_be_visible()
    expect(thought).to_contain_text("Two and two make what?")


def test_what_was_thought_is_not_sent_back(playground: Playground, server: PagesServer) -> None:
    server.engine.answers = ["<think>\nSecret.\n</think>\n\nFour."]
    playground.chat("What is 2 + 2?")
    playground.chat("And 3 + 3?")
    assert "Four." in server.engine.prompt()
    assert "Secret" not in server.engine.prompt()
