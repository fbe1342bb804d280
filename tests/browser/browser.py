"""Debian's Chromium without a window, and a watch over everything that a page must not do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page, Request, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = (
    "tests of the pages need Chromium on PATH (Debian, as root: apt-get install --no-install-recommends chromium)"
)
TIMEOUT_MS = 20_000
"""Much, as tests share two cores with others."""
SERIOUS = ("serious", "critical")

NOTE_VIOLATIONS = """
window.__violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.__violations.push(
    `${event.violatedDirective} forbids ${event.blockedURI} (${event.sourceFile}:${event.lineNumber})`));
"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; one process for all tests that are given it."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path, NO_BROWSER
    # Its sandbox needs a user who is not root.
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=args)
        try:
            yield browser
        finally:
            browser.close()


class Watch:
    """Notes what pages of a context say on the console, which dialogs they open, what they ask of whom."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        """`url`: the origin that may be asked."""
        self._origin = f"{url}/"
        self.faults: list[str] = []
        self.urls: list[str] = []
        """Whatever was asked for."""
        context.add_init_script(NOTE_VIOLATIONS)
        context.on("console", self._on_console)
        context.on("dialog", self._on_dialog)
        context.on("request", self._on_request)
        context.on("weberror", lambda error: self.faults.append(f"uncaught: {error.error}"))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console: {message.text}")

    def _on_dialog(self, dialog: Dialog) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _on_request(self, request: Request) -> None:
        self.urls.append(request.url)
        if not request.url.startswith(self._origin):
            self.faults.append(f"asked for {request.url}")

    def forget(self, *words: str) -> None:
        """Leave out the faults that have one of `words` in them: what the test has brought about itself."""
        self.faults = [fault for fault in self.faults if not any(word in fault for word in words)]

    def check(self, page: Page) -> None:
        violations: list[str] = page.evaluate("window.__violations")
        faults = [*self.faults, *violations]
        assert not faults, "\n".join(faults)


@contextlib.contextmanager
def watched_page(browser: Browser, url: str, **options: Any) -> Iterator[tuple[Page, Watch]]:
    """A page of a fresh profile at the server at `url`; `options`: those of Browser.new_context.

    The watch's faults fail the test at the end of the block.
    """
    with contextlib.closing(browser.new_context(base_url=url, **options)) as context:
        context.set_default_timeout(TIMEOUT_MS)
        watch = Watch(context, url)
        page = context.new_page()
        yield page, watch
        watch.check(page)


def serious_faults(page: Page) -> list[str]:
    """What axe finds on the page as it is now, a line for each element."""
    page.evaluate(AXE_SCRIPT)
    results = page.evaluate(f"axe.run(document, {json.dumps({'resultTypes': ['violations']})})")
    return [
        f"{violation['id']} ({violation['impact']}): {node['html']} {node['failureSummary']}"
        for violation in results["violations"]
        if violation["impact"] in SERIOUS
        for node in violation["nodes"]
    ]
