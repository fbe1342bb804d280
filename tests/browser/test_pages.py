"""The pages in a real browser, in short; tests/slow/browser has each of their features."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.browser import hostile
from tests.browser.browser import Watch, serious_faults, watched_page
from tests.browser.pages_server import PagesServer
from tests.browser.playground import Playground

ROUTES = ["", "ui", "info", "health", "openapi.json", "readyz", "v1"]
"""The first part of every path that the page may ask for by itself."""
PHONE: ViewportSize = {"width": 390, "height": 780}
CUT_OFF = """(place) => [...document.querySelectorAll(`${place}, ${place} *`)]
    .filter((element) => element.checkVisibility() && element.getBoundingClientRect().right > innerWidth)
    .map((element) => element.outerHTML)"""
"""The elements of a place that end to the right of the page."""
DIGITS = "0123456789" * 6
"""An answer of 60 tokens: the model's tokenizer knows no two digits."""


def test_the_page_opens_and_says_what_it_is_connected_to(playground: Playground, watch: Watch) -> None:
    """The watch's faults are a console error, a violation of the policy, a dialog, a foreign origin."""
    expect(playground.page).to_have_title(re.compile("pytgi"))
    expect(playground.server).to_contain_text("org/model")
    assert {url.split("/")[3] for url in watch.urls} <= set(ROUTES)


def test_a_phone_shows_all_of_a_page_for_a_model_in_a_folder(browser: Browser, server: PagesServer) -> None:
    """The welcome goes by the folder's name, nothing is wider than its place, and there is a request to copy."""
    models = {"data": [{"id": "/root/.cache/pytgi/models/Qwen2.5_Coder_0.5B_Instruct_in_four_bits_by_groups_of_128"}]}
    with watched_page(browser, server.url, viewport=PHONE) as (page, _):
        page.route("**/v1/models", lambda route: route.fulfill(json=models))
        playground = Playground.open(page)
        expect(playground.server).to_have_text("Qwen2.5_Coder_0.5B_Instruct_in_four_bits_by_groups_of_128 · ready")
        assert page.evaluate(CUT_OFF, "#welcome") == []
        assert "Why is the sky blue?" in playground.copy_as("curl")
        playground.show_settings()
        assert page.evaluate(CUT_OFF, "#settings") == []


def test_sixty_tokens_come_one_by_one(playground: Playground, server: PagesServer) -> None:
    """No token is made before the one before it is seen."""
    server.engine.answers = [DIGITS]
    server.engine.allow(0)
    playground.note_growth()
    playground.ask("Count.")
    expect(playground.stop).to_be_visible()
    for number in range(1, len(DIGITS) + 1):
        server.engine.allow(1)
        playground.see(DIGITS[:number])
    server.engine.allow(None)
    playground.settled()
    growth = playground.growth()
    assert sum(later > earlier for earlier, later in zip(growth, growth[1:], strict=False)) >= len(DIGITS) - 1


def test_stop_ends_the_request_and_frees_its_blocks(playground: Playground, server: PagesServer) -> None:
    server.engine.answers = [DIGITS]
    server.engine.allow(5)
    playground.ask("Count.")
    answer = playground.answers.last
    expect(answer).to_contain_text(DIGITS[:5])
    assert server.engine.stats.num_used_blocks > 0
    playground.stop.click()
    playground.settled()
    server.until(lambda: server.engine.num_aborted == 1)
    assert server.engine.stats.num_used_blocks == 0
    server.until(lambda: server.metric("pytgi_kv_blocks_used") == 0)
    expect(answer).to_contain_text(DIGITS[:5])
    server.engine.allow(None)
    expect(playground.chat("And now?")).to_contain_text("Hello, world!")


def test_a_reload_keeps_conversations(playground: Playground) -> None:
    playground.chat("The first question.")
    playground.new_conversation.click()
    expect(playground.questions).to_have_count(0)
    playground.chat("The second question.")
    playground.page.reload()
    expect(playground.questions).to_contain_text(["The second question."])
    playground.conversation("The first question.").click()
    expect(playground.questions).to_contain_text(["The first question."])
    expect(playground.answers).to_contain_text(["Hello, world!"])


def test_nothing_that_a_model_writes_runs(playground: Playground, server: PagesServer) -> None:
    server.engine.answers = ["\n\n".join(hostile.TEXTS)]
    server.engine.step_s = 0
    playground.chat("Attack me.")
    assert playground.faults() == []
    playground.page.reload()
    expect(playground.answers).to_have_count(1)
    assert playground.faults() == []


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Browser, server: PagesServer, color_scheme: str) -> None:
    server.engine.answers = ["# Title\n\n`code` and [a link](https://example.invalid).\n\n```python\nx = 1  # one\n```"]
    with watched_page(browser, server.url, color_scheme=color_scheme) as (page, _):
        Playground.open(page).chat("Show me everything.")
        assert serious_faults(page) == []


def test_the_dashboard_draws_what_the_server_does(page: Page, server: PagesServer) -> None:
    page.goto("/dashboard")
    with server.streaming(2):
        expect(page.get_by_role("img", name=re.compile("Requests.*running 2"))).to_be_visible()
