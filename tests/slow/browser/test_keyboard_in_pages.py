"""The playground without a mouse: everything is reached, everything shows where the focus is."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.browser.pages_server import PagesServer
from tests.browser.playground import Playground

MAX_STOPS = 120

DESCRIBE = """() => {
    const element = document.activeElement;
    if (element === document.body) return null;
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    const isOutlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
    return {
        id: element.id || element.getAttribute("aria-label") || element.textContent.trim() || element.localName,
        isMarked: isOutlined || getComputedStyle(element.parentElement).boxShadow !== "none",
        isSeen: box.width > 0 && box.bottom > 0 && box.top < innerHeight,
        isNative: element.matches("a[href], button, input, select, textarea, summary, [tabindex='0']"),
    };
}"""


def stops_of(playground: Playground) -> list[dict[str, object]]:
    """What Tab comes to, from the beginning of the page to its end."""
    playground.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    stops = []
    for _ in range(MAX_STOPS):
        playground.page.keyboard.press("Tab")
        stop = playground.page.evaluate(DESCRIBE)
        if stop is None or (stops and stop == stops[0]):
            return stops
        stops.append(stop)
    raise AssertionError("Tab never comes to the end")


def test_every_stop_of_tab_is_seen_and_marked(playground: Playground) -> None:
    playground.chat("Hello")
    stops = stops_of(playground)
    assert len(stops) > 10
    assert [stop["id"] for stop in stops if not (stop["isMarked"] and stop["isSeen"] and stop["isNative"])] == []


def test_a_chat_needs_no_mouse(playground: Playground, server: PagesServer) -> None:
    keyboard = playground.page.keyboard
    expect(playground.message).to_be_focused()
    keyboard.type("first line")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    keyboard.press("Enter")
    playground.settled()
    assert "first line\nsecond line<|im_end|>" in server.engine.prompt()
    expect(playground.answers.last).to_contain_text("Hello, world!")
    expect(playground.message).to_be_focused()
    server.engine.allow(2)
    keyboard.type("Go on.")
    keyboard.press("Enter")
    expect(playground.stop).to_be_visible()
    keyboard.press("Escape")
    playground.settled()
    server.until(lambda: server.engine.num_aborted == 1)


def test_tabs_follow_the_arrows(playground: Playground) -> None:
    chat, completion = playground.tab("Chat"), playground.tab("Completion")
    expect(chat).to_have_attribute("aria-selected", "true")
    chat.focus()
    playground.page.keyboard.press("ArrowRight")
    expect(completion).to_be_focused()
    expect(completion).to_have_attribute("aria-selected", "true")
    expect(playground.page.get_by_role("tabpanel", name="Completion")).to_be_visible()


def test_an_answer_is_spoken_politely(playground: Playground) -> None:
    expect(playground.log).to_have_attribute("aria-live", "polite")
