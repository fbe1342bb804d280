"""A server that starts, dies or is full is told, and a page goes on by itself when it is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.browser import watched_page
from tests.browser.pages_server import loading_server, pages_server
from tests.browser.playground import Playground


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_dead_server_is_told_and_found_again(browser: Browser, tmp_path: Path, is_streaming: bool) -> None:
    with pages_server(tmp_path) as server, watched_page(browser, server.url) as (page, watch):
        playground = Playground.open(page)
        playground.chat("Before.")
        alive = playground.server.inner_text()
        if is_streaming:
            server.engine.answers = ["a long answer that breaks off"]
            server.engine.allow(8)
            playground.ask("While it dies.")
            expect(playground.answers.last).to_contain_text("a long")
        server.kill()
        if not is_streaming:
            playground.ask("After it has died.")
        expect(playground.alert).to_contain_text("server")
        playground.settled()
        if is_streaming:
            expect(playground.answers.last).to_contain_text("a long")
            expect(playground.answers.last).to_contain_text(re.compile(r"\d tokens or more"))
            expect(playground.answers.last.get_by_role("button", name="Continue", exact=True)).to_be_visible()
        expect(playground.server).not_to_have_text(alive)
        server.start()
        expect(playground.server).to_have_text(alive)
        playground.alert.get_by_role("button", name="Try again").click()
        playground.settled()
        expect(playground.answers.last).to_contain_text("Hello, world!")
        expect(playground.questions).to_contain_text(["Before."])
        watch.forget("ERR_")


def test_a_reload_while_an_answer_comes_ends_the_request(browser: Browser, tmp_path: Path) -> None:
    with pages_server(tmp_path) as server, watched_page(browser, server.url) as (page, _):
        playground = Playground.open(page)
        server.engine.answers = ["a long answer that breaks off"]
        server.engine.allow(8)
        playground.ask("Go on.")
        expect(playground.answers.last).to_contain_text("a long")
        page.reload()
        server.until(lambda: server.engine.num_aborted == 1)
        expect(playground.questions).to_contain_text(["Go on."])
        expect(playground.answers.last).to_contain_text("a long")


def test_a_full_server_says_so(browser: Browser, tmp_path: Path) -> None:
    with (
        pages_server(tmp_path, max_concurrent_requests=1) as server,
        watched_page(browser, server.url) as (page, watch),
    ):
        first = Playground.open(page)
        server.engine.allow(1)
        first.ask("I hold the only permit.")
        expect(first.stop).to_be_visible()
        second = Playground.open(page.context.new_page())
        second.ask("Me, too.")
        expect(second.alert).to_contain_text("full")
        first.stop.click()
        first.settled()
        second.alert.get_by_role("button", name="Try again").click()
        server.engine.allow(None)
        expect(second.answers.last).to_contain_text("Hello, world!")
        watch.forget("429")


def test_the_dashboard_that_is_opened_while_the_model_loads_goes_on_by_itself(browser: Browser, tmp_path: Path) -> None:
    with loading_server(tmp_path) as server, watched_page(browser, server.url) as (page, watch):
        page.goto("/dashboard")
        expect(page.get_by_role("heading", name="pytgi is starting")).to_be_visible()
        server.become_ready()
        expect(page.get_by_role("heading", name="Dashboard")).to_be_visible()
        watch.forget("503")
