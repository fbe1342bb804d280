"""Answers that are none of the API's, tabs beside each other, and much text: the playground stays of use."""

from __future__ import annotations

import json
import time

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.browser import Watch
from tests.browser.pages_server import PagesServer
from tests.browser.playground import Playground

CHATS = "**/v1/chat/completions"
TOKEN = 'data: {"choices": [{"index": 0, "delta": {"content": "so far"}}]}\n\n'
MAX_SEND_MS = 5000
MAX_FRAME_MS = 1500
"""Several times what it takes on two cores that others use."""


def answer(page: Page, body: str, status: int = 200, content_type: str = "text/event-stream") -> None:
    """Let somebody between the page and the server answer the next chats."""

    def fulfill(route: Route) -> None:
        route.fulfill(status=status, body=body, headers={"content-type": content_type})

    page.route(CHATS, fulfill)


def goes_on(playground: Playground) -> None:
    """The failure is told, and the server's own answer comes at the next try."""
    expect(playground.alert.get_by_role("button", name="Try again")).to_be_visible()
    playground.settled()
    playground.page.unroute(CHATS)
    playground.alert.get_by_role("button", name="Try again").click()
    expect(playground.answers.last).to_contain_text("Hello, world!")


@pytest.mark.parametrize(
    "data", ["{", "null", "[]", '"x"', "{}", '{"choices": 3}', '{"error": {}}', '{"error": {"message": ""}}', "<html>"]
)
def test_an_event_that_is_none_is_told(playground: Playground, data: str) -> None:
    answer(playground.page, f"{TOKEN}data: {data}\n\n")
    playground.ask("Hello")
    expect(playground.answers.last).to_contain_text("so far")
    expect(playground.alert.locator("span").first).not_to_be_empty()
    goes_on(playground)


@pytest.mark.parametrize("body", ["", TOKEN, f"{TOKEN}data: {{", ":\n\n", "<html>" * 1000])
def test_a_stream_that_ends_before_its_end_is_told(playground: Playground, body: str) -> None:
    answer(playground.page, body)
    playground.ask("Hello")
    expect(playground.alert).to_contain_text("broke off")
    goes_on(playground)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, '{"error": {"message": "no such thing", "type": "x"}}', "no such thing"),
        (422, '{"error": "wrong value", "error_type": "validation"}', "wrong value"),
        (424, '{"error": {"message": "the engine is gone"}}', "the engine is gone"),
        (429, "", "full"),
        (500, "", "500"),
        (500, "null", "null"),
        (502, "<html><h1>Bad Gateway</h1></html>", "<h1>Bad Gateway</h1>"),
        (503, "{}", "cannot answer"),
    ],
)
def test_a_refusal_is_told(playground: Playground, watch: Watch, status: int, body: str, words: str) -> None:
    answer(playground.page, body, status)
    playground.ask("Hello")
    expect(playground.alert).to_contain_text(words)
    goes_on(playground)
    assert playground.faults() == []
    watch.forget(f"status of {status}")


def test_a_key_that_no_header_can_carry_is_not_remembered(playground: Playground) -> None:
    """It would make every request of the next visit fail, as if there were no server."""
    playground.show_settings()
    playground.page.get_by_role("checkbox", name="Remember").check()
    playground.api_key.fill("ключ")
    playground.api_key.press("Tab")
    playground.page.reload()
    expect(playground.chat("Hello")).to_contain_text("Hello, world!")


@pytest.mark.parametrize(
    "value", ["{", "null", "5", "true", '"text"', "[1]", '{"parameters": 3, "model": null, "tools": {}}']
)
def test_whatever_is_kept_by_somebody_else_the_page_opens(playground: Playground, value: str) -> None:
    """Under every name that the page reads: of an older page, or of another program at this address."""
    names = [
        "settings",
        "texts/completion",
        "texts/infill",
        "key",
        "theme",
        "is-open/settings",
        "is-open/conversations",
    ]
    for name in [*names, "conversation/1-2"]:
        playground.page.evaluate("(pair) => localStorage.setItem(...pair)", [f"pytgi/{name}", value])
    playground.page.reload()
    expect(playground.server).to_contain_text("ready")
    playground.show_settings()
    playground.tools.fill("")
    expect(playground.chat("Hello")).to_contain_text("Hello, world!")
    playground.tab("Completion").click()
    expect(playground.complete("Hello")).to_contain_text("Hello, world!")


# ---- tabs beside each other ----


def test_a_tab_that_is_closed_does_not_undo_what_was_said_in_another(playground: Playground) -> None:
    playground.chat("first question")
    second = Playground.open(playground.page.context.new_page())
    expect(second.questions).to_have_count(1)
    second.message.fill("a draft")
    playground.chat("second question")
    expect(second.questions).to_have_count(2)
    expect(second.message).to_have_value("a draft")
    second.page.close(run_before_unload=True)
    playground.page.reload()
    expect(playground.questions).to_contain_text(["first question", "second question"])


def test_a_conversation_that_is_deleted_is_so_in_every_tab(playground: Playground) -> None:
    playground.chat("a secret")
    second = Playground.open(playground.page.context.new_page())
    second.message.fill("a draft")
    playground.conversations.get_by_role("button", name="Delete a secret", exact=True).click()
    expect(second.questions).to_have_count(0)
    expect(second.conversation("a secret")).to_have_count(0)
    expect(second.message).to_have_value("a draft")
    second.page.reload()
    expect(second.send).to_be_visible()
    assert "a secret" not in second.page.evaluate("JSON.stringify({...localStorage})")


def test_a_question_that_is_edited_in_one_tab_is_so_in_the_other(playground: Playground) -> None:
    playground.chat("first wording")
    second = Playground.open(playground.page.context.new_page())
    for editing, following, words in ((playground, second, "second wording"), (second, playground, "third wording")):
        editing.questions.last.get_by_role("button", name="Edit", exact=True).click()
        editing.page.get_by_role("textbox", name="Edit message", exact=True).fill(words)
        editing.button("Send again").click()
        expect(following.questions).to_contain_text([words])
        editing.settled()
    second.page.close(run_before_unload=True)
    playground.page.reload()
    expect(playground.questions).to_contain_text(["third wording"])


def test_tabs_may_write_beside_each_other(playground: Playground, server: PagesServer) -> None:
    """In one conversation, too: the tab that ends last has the last word, and nothing breaks."""
    playground.chat("begin")
    second = Playground.open(playground.page.context.new_page())
    server.engine.answers = ["of the first " * 20, "of the second " * 20]
    server.engine.allow(4)
    playground.ask("one")
    expect(playground.answers.last).to_contain_text("of t")
    second.ask("two")
    server.engine.allow(None)
    playground.settled()
    second.settled()
    expect(playground.questions.last).to_be_visible()
    assert playground.faults() == second.faults() == []


def test_a_browser_that_keeps_no_more_is_told_and_the_chat_goes_on(playground: Playground) -> None:
    playground.page.evaluate(
        """() => { for (let size = 1 << 22; size > 0; size >>= 1) {
            try { for (let n = 0; ; n += 1) localStorage.setItem(`filler/${size}/${n}`, "x".repeat(size)); } catch {}
        } }"""
    )
    expect(playground.chat("Is there room?")).to_contain_text("Hello, world!")
    expect(playground.page.get_by_text("This browser keeps no more")).to_be_visible()
    expect(playground.chat("And now?")).to_contain_text("Hello, world!")


def test_a_conversation_is_deleted_while_it_is_written(playground: Playground, server: PagesServer) -> None:
    server.engine.answers = ["a long answer " * 20]
    server.engine.allow(5)
    playground.ask("Go on.")
    expect(playground.answers.last).to_contain_text("a lon")
    playground.conversations.get_by_role("button", name="Delete Go on.", exact=True).click()
    server.until(lambda: server.engine.num_aborted == 1)
    expect(playground.questions).to_have_count(0)
    server.engine.allow(None)
    expect(playground.chat("Something else.")).to_contain_text("Hello, world!")
    playground.page.reload()
    expect(playground.conversation("Go on.")).to_have_count(0)


def test_titles_end_at_whole_characters(playground: Playground) -> None:
    playground.chat("x" * 59 + "😀" * 5)
    titles = playground.conversations.get_by_role("listitem").all_inner_texts()
    assert any("x…" in title for title in titles) and not any("\ufffd" in title for title in titles)


# ---- much ----


SEND = """() => {
    document.getElementById("message").value = "And now?";
    const started = performance.now();
    document.getElementById("send").click();
    document.getElementById("log").scrollHeight;
    return performance.now() - started;
}"""


def test_a_long_conversation_is_shown_soon(playground: Playground, watch: Watch) -> None:
    """The conversation has 2000 turns. While the log was laid out for each of them this took longer than 20 s."""
    said = "Some **bold** text with `code`, *stars* and more of it. " * 8
    turns: list[dict[str, object]] = []
    for number in range(1000):
        turns.append({"role": "user", "text": f"question {number}"})
        turns.append({"role": "assistant", "text": said, "reasoning": "", "calls": [], "finish": "stop"})
    kept = {"id": "1-2", "changed": 1, "turns": turns, "draft": "", "settings": {}}
    page = playground.page
    page.evaluate("(text) => localStorage.setItem('pytgi/conversation/1-2', text)", json.dumps(kept))
    started = time.perf_counter()
    page.reload()
    expect(page.locator("article")).to_have_count(2000)
    print(f"shown after {time.perf_counter() - started:.1f} s")
    took_ms = page.evaluate(SEND)
    print(f"one more turn took {took_ms:.0f} ms")
    assert took_ms < MAX_SEND_MS
    watch.forget("status of 4")


GROW = """async ([text, pieces]) => {
    const { showMarkdown } = await import("./ui/markdown_view.js");
    const box = document.createElement("div");
    document.querySelector("[role=log]").append(box);
    showMarkdown(box, text);
    const times = [];
    for (const piece of pieces) {
        text += piece;
        const started = performance.now();
        showMarkdown(box, text);
        times.push(performance.now() - started);
    }
    return times.sort((one, other) => one - other)[Math.floor(times.length / 2)];
}"""
MUCH = {
    "paragraphs": "Some **bold** text with `code`, *stars* and a [link](https://a.invalid/x) in it.\n\n" * 5000,
    "code": "```python\n" + "def f(x):\n    return x + 1  # one\n" * 12_000,
    "openings": ("**a " * 4000 + "\n\n") * 25,
    "lines": "word " * 80_000,
}
"""Some 400,000 characters each, as 100,000 tokens have."""


@pytest.mark.parametrize("name", MUCH)
def test_what_is_shown_already_does_not_slow_what_comes(playground: Playground, name: str) -> None:
    took_ms = playground.page.evaluate(GROW, [MUCH[name], ["a", " b", " c", "\n", "d"]])
    print(f"{name}: {took_ms:.0f} ms for one more token behind {len(MUCH[name])} characters")
    assert took_ms < MAX_FRAME_MS
