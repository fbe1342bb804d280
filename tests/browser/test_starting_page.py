"""The page of a server that is starting, in a browser: it tells the stage and goes on by itself."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Browser, expect

from engine.link.progress import Stage
from tests.browser.browser import serious_faults, watched_page
from tests.browser.pages_server import loading_server


def test_a_page_opened_while_the_model_loads_goes_on_by_itself(browser: Browser, tmp_path: Path) -> None:
    with loading_server(tmp_path) as server, watched_page(browser, server.url) as (page, watch):
        page.goto("/")
        expect(page.get_by_role("heading", name="pytgi is starting")).to_be_visible()
        server.tell(Stage.LOADING, 0.42, "Loading weights: 42 %")
        expect(page.get_by_role("status", name="Server")).to_have_text("Loading weights: 42 %")
        expect(page.get_by_role("progressbar")).to_have_js_property("value", 0.42)
        expect(page.get_by_text("The start began")).to_contain_text(re.compile(r"began \d+ s ago\."))
        assert serious_faults(page) == []
        server.become_ready()
        expect(page.get_by_role("status", name="Server")).to_contain_text("org/model")
        watch.forget("503")
