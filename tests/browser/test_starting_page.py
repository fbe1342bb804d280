"""The page of a server that is starting, in a browser: it tells the stage and goes on by itself."""

from __future__ import annotations

import contextlib
from pathlib import Path

from playwright.sync_api import Browser, expect

from engine.link.messages import EngineStarting
from engine.link.progress import Stage
from tests.browser.browser import serious_faults, watched_page
from tests.e2e.http_process import http_process, ready
from tests.e2e.scripted_engine import scripted_engine
from tests.e2e.test_start import Browser as Connection


def test_a_page_opened_while_the_model_loads_goes_on_by_itself(
    browser: Browser, tiny_model_dir: Path, tmp_path: Path
) -> None:
    early = {"is_listening_early": True, "graceful_termination_timeout_s": 1}
    with http_process(tiny_model_dir, tmp_path / "log", **early) as http:
        with contextlib.closing(Connection(http.port)) as connection:
            http.endpoint.send(EngineStarting(stage=Stage.LOADING, done=0.42, text="Loading weights: 42 %"))
            connection.wait_for(Stage.LOADING)
        with watched_page(browser, http.url) as (page, watch):
            page.goto("/")
            expect(page.get_by_role("status", name="Server")).to_have_text("Loading weights: 42 %")
            expect(page.get_by_role("progressbar")).to_have_attribute("value", "0.42")
            assert not serious_faults(page)
            http.endpoint.send(ready(tiny_model_dir, max_total_tokens=100))
            with scripted_engine(http.endpoint, list(b"hello"), 0.01):
                expect(page.get_by_role("status", name="Server")).to_contain_text("org/model")
            watch.forget("503")
