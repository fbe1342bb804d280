"""The pages in light, dark and on a phone: no serious fault for axe, nothing cut off. WRITE_PICTURES=1 keeps them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.browser import serious_faults, watched_page
from tests.browser.pages_server import PagesServer
from tests.browser.playground import Playground

PICTURES = Path(__file__).parents[3] / "docs" / "images"
MAX_PICTURE_BYTES = 150_000
LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1200, "height": 760}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1200, "height": 760}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True},
}
QUESTION = "Write a Python function is_prime(n)."
ANSWER = """A number is prime when nothing between 2 and its **square root** divides it:

```python
def is_prime(n: int) -> bool:
    # 0, 1 and negative numbers are not prime
    if n < 2:
        return False
    return all(n % d for d in range(2, int(n**0.5) + 1))
```

| n | `is_prime(n)` |
|---|---|
| 7 | `True` |
| 9 | `False` |
"""
PERIOD_MS = 6_000
"""The time for which the dashboard shows a load."""


def keep(page: Page, name: str) -> None:
    """Take a picture; it stands in docs/images only if WRITE_PICTURES is set."""
    picture = page.screenshot(animations="disabled", caret="hide")
    assert len(picture) < MAX_PICTURE_BYTES
    if os.environ.get("WRITE_PICTURES"):
        PICTURES.mkdir(exist_ok=True)
        (PICTURES / f"{name}.png").write_bytes(picture)


def check_width(page: Page) -> None:
    width, limit = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= limit, "the page is wider than the screen"


@pytest.mark.parametrize("look", LOOKS)
def test_a_chat(browser: Browser, server: PagesServer, look: str) -> None:
    server.engine.answers = [ANSWER, "<think>\nA joke.\n</think>\n\nBecause it has no factors to talk to."]
    server.engine.step_s = 0.02
    with watched_page(browser, server.url, **LOOKS[look]) as (page, _):
        playground = Playground.open(page)
        playground.chat(QUESTION)
        keep(page, f"chat-{look}")
        playground.chat("Why is 7 lonely?")
        assert serious_faults(page) == []
        check_width(page)


@pytest.mark.parametrize("look", LOOKS)
def test_everything_that_can_be_opened(browser: Browser, server: PagesServer, look: str) -> None:
    """Settings, an editor, a call, an error, both other modes."""
    with watched_page(browser, server.url, **LOOKS[look]) as (page, _):
        playground = Playground.open(page)
        playground.show_settings()
        assert serious_faults(page) == []
        expect(page.get_by_role("link", name="Dashboard")).to_have_count(1)
        if look == "phone":  # where the settings lie over the rest
            playground.button("Settings").click()
        server.engine.error = "the engine could not go on"
        playground.chat("Fail.")
        expect(playground.alert).to_be_visible()
        playground.questions.first.get_by_role("button", name="Edit", exact=True).click()
        assert serious_faults(page) == []
        server.engine.reset()
        for mode in ("Completion", "Fill in the middle"):
            playground.tab(mode).click()
            assert serious_faults(page) == []
        check_width(page)


@pytest.mark.parametrize("look", LOOKS)
def test_the_dashboard(browser: Browser, server: PagesServer, look: str) -> None:
    with watched_page(browser, server.url, **LOOKS[look]) as (page, _):
        page.goto("/dashboard")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        for num_streams in (2, 5):
            with server.streaming(num_streams):
                page.wait_for_timeout(PERIOD_MS)
        with server.streaming(3):
            page.wait_for_timeout(PERIOD_MS)
            keep(page, f"dashboard-{look}")
            assert serious_faults(page) == []
            check_width(page)


def test_a_screen_that_is_zoomed_in_four_times_loses_nothing(browser: Browser, server: PagesServer) -> None:
    with watched_page(browser, server.url, viewport={"width": 320, "height": 256}) as (page, _):
        playground = Playground.open(page)
        playground.chat("Hello")
        check_width(page)
        playground.message.scroll_into_view_if_needed()
        expect(playground.message).to_be_in_viewport()


def test_colours_follow_the_persons_choice(playground: Playground) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    before = playground.page.evaluate(background)
    playground.show_settings()
    playground.page.get_by_role("combobox", name="Theme").select_option("dark")
    assert playground.page.evaluate(background) != before
    playground.page.reload()
    expect(playground.send).to_be_visible()
    assert playground.page.evaluate(background) != before
