"""The dashboard: figures of the server as they change, with and without a key, and a server that goes and comes."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.browser import watched_page
from tests.browser.pages_server import PagesServer, pages_server


def tile(page: Page, label: str) -> Locator:
    """The figure under a label."""
    term = page.get_by_role("term").filter(has_text=re.compile(f"^{re.escape(label)}$"))
    return term.locator("xpath=following-sibling::dd")


def status(page: Page) -> Locator:
    return page.get_by_role("status", name="Server")


def number(text: str) -> float:
    return float(re.findall(r"[\d.]+", text)[0])


def test_figures_follow_what_the_server_does(page: Page, server: PagesServer) -> None:
    page.goto("/dashboard")
    expect(status(page)).to_have_text("Connected")
    expect(tile(page, "Running")).to_have_text("0")
    with server.streaming(3):
        expect(tile(page, "Running")).to_have_text("3")
        expect(tile(page, "KV cache in use")).to_have_text(re.compile(r"^[1-9]\d*%$"))
        expect(tile(page, "Tokens per second")).to_have_text(re.compile(r"^[1-9]\d"))
        expect(tile(page, "First token, median")).to_have_text(re.compile("s$"))
        expect(tile(page, "Memory")).to_have_text(re.compile("MiB|GiB"))
        before = server.engine.num_tokens
        started = time.perf_counter()
        time.sleep(3)
        rate = (server.engine.num_tokens - before) / (time.perf_counter() - started)
        shown = number(tile(page, "Tokens per second").inner_text())
        assert shown == pytest.approx(rate, rel=0.5)
    expect(tile(page, "Running")).to_have_text("0")
    expect(tile(page, "KV cache in use")).to_have_text("0%")


def test_every_chart_tells_its_figures_in_words_and_as_a_table(page: Page, server: PagesServer) -> None:
    page.goto("/dashboard")
    with server.streaming(2):
        requests = page.get_by_role("img", name=re.compile("Requests.*running 2"))
        expect(requests).to_be_visible()
    assert page.get_by_role("img").count() >= 8
    page.get_by_role("button", name="Table").click()
    expect(page.get_by_role("img")).to_have_count(0)
    highest = page.get_by_role("row", name=re.compile("^running ")).get_by_role("cell").last
    expect(highest).to_have_text("2")


def test_a_pause_holds_the_picture(page: Page, server: PagesServer) -> None:
    page.goto("/dashboard")
    expect(tile(page, "Running")).to_have_text("0")
    page.get_by_role("button", name="Pause").click()
    with server.streaming(2):
        time.sleep(2.5)
        expect(tile(page, "Running")).to_have_text("0")
        page.get_by_role("button", name="Pause").click()
        expect(tile(page, "Running")).to_have_text("2")


def test_a_key_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    with (
        pages_server(tmp_path, api_key="secret") as server,
        watched_page(browser, server.url) as (page, watch),
    ):
        page.goto("/dashboard")
        expect(status(page)).to_contain_text("API key")
        field = page.get_by_role("textbox", name="API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(status(page)).to_contain_text("wrong")
        field.fill("secret")
        field.press("Enter")
        expect(status(page)).to_have_text("Connected")
        expect(tile(page, "Running")).to_have_text("0")
        assert not any("secret" in url for url in watch.urls)
        assert "secret" not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
        watch.forget("401")


def test_a_dead_server_is_told_and_found_again(browser: Browser, tmp_path: Path) -> None:
    with pages_server(tmp_path) as server, watched_page(browser, server.url) as (page, watch):
        page.goto("/dashboard")
        expect(tile(page, "Running")).to_have_text("0")
        server.kill()
        expect(status(page)).not_to_have_text("Connected")
        server.start()
        expect(status(page)).to_have_text("Connected")
        watch.forget("ERR_")
