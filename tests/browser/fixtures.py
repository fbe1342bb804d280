"""The fixtures of the tests in a browser; both folders of them import these."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.browser import Watch, chromium, watched_page
from tests.browser.pages_server import PagesServer, pages_server
from tests.browser.playground import Playground


# Of the module: playwright's event loop runs until it is closed, and no async test of another module could run.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PagesServer]:
    with pages_server(tmp_path_factory.mktemp("pages")) as server:
        yield server


@pytest.fixture
def server(shared_server: PagesServer) -> Iterator[PagesServer]:
    """A server whose engine writes as it does by default."""
    yield shared_server
    shared_server.engine.allow(None)
    shared_server.until(lambda: shared_server.engine.num_open == 0)
    shared_server.engine.reset()


@pytest.fixture
def watched(browser: Browser, server: PagesServer) -> Iterator[tuple[Page, Watch]]:
    with watched_page(browser, server.url) as watched:
        yield watched


@pytest.fixture
def page(watched: tuple[Page, Watch]) -> Page:
    return watched[0]


@pytest.fixture
def watch(watched: tuple[Page, Watch]) -> Watch:
    return watched[1]


@pytest.fixture
def playground(page: Page) -> Playground:
    """The playground, opened."""
    return Playground.open(page)
