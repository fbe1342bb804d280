"""The API key: asked for where there is one, kept in memory, and in the browser's storage only if asked to be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.browser import Watch, watched_page
from tests.browser.pages_server import PagesServer, pages_server
from tests.browser.playground import Playground

KEY = "sk-a-secret-of-mine"
STORED = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, history.state])"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PagesServer]:
    with pages_server(tmp_path_factory.mktemp("guarded"), api_key=KEY) as server:
        yield server


@pytest.fixture
def opened(browser: Browser, guarded: PagesServer) -> Iterator[tuple[Playground, Watch]]:
    with watched_page(browser, guarded.url) as (page, watch):
        yield Playground.open(page), watch
        watch.forget("401")


def is_stored(page: Page) -> bool:
    return KEY in page.evaluate(STORED)


def test_a_key_is_asked_for_and_kept_in_memory_only(opened: tuple[Playground, Watch], guarded: PagesServer) -> None:
    playground, watch = opened
    playground.chat("Hello without a key")
    expect(playground.alert).to_contain_text("key")
    assert guarded.engine.requests == []
    playground.show_settings()
    playground.api_key.fill(KEY)
    playground.api_key.press("Tab")
    playground.alert.get_by_role("button", name="Try again").click()
    playground.settled()
    expect(playground.answers.last).to_contain_text("Hello, world!")
    assert not is_stored(playground.page)
    assert not any(KEY in url for url in watch.urls)
    playground.page.reload()
    expect(playground.send).to_be_visible()
    expect(playground.api_key).to_have_value("")


def test_a_key_is_remembered_and_forgotten_at_a_persons_word(opened: tuple[Playground, Watch]) -> None:
    playground, _ = opened
    playground.show_settings()
    remember = playground.page.get_by_role("checkbox", name="Remember")
    playground.api_key.fill(KEY)
    remember.check()
    assert is_stored(playground.page)
    playground.page.reload()
    expect(playground.chat("Hello with a key")).to_contain_text("Hello, world!")
    playground.show_settings()
    remember.uncheck()
    assert not is_stored(playground.page)
    playground.page.reload()
    expect(playground.send).to_be_visible()
    assert not is_stored(playground.page)


def test_a_copied_request_names_a_variable_and_not_the_key(opened: tuple[Playground, Watch]) -> None:
    playground, _ = opened
    playground.show_settings()
    playground.api_key.fill(KEY)
    playground.api_key.press("Tab")
    playground.message.fill("Hello")
    for language in ("curl", "Python", "JavaScript"):
        program = playground.copy_as(language)
        assert "API_KEY" in program
        assert KEY not in program
    assert not is_stored(playground.page)


def test_a_key_that_no_header_can_carry_is_told(opened: tuple[Playground, Watch]) -> None:
    playground, _ = opened
    playground.show_settings()
    playground.api_key.fill("schlüssel\nmit zeile")
    playground.api_key.press("Tab")
    assert not playground.api_key.evaluate("(field) => field.validity.valid")


def test_the_key_is_not_readable_on_the_screen(opened: tuple[Playground, Watch]) -> None:
    playground, _ = opened
    hiding = "(field) => field.type === 'password' || getComputedStyle(field).webkitTextSecurity === 'disc'"
    assert playground.api_key.evaluate(hiding)
