"""The playground as a person knows it: everything is found by its role and its name."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

HTML = {"Accept": "text/html"}

NOTE_GROWTH = """(log) => {
    window.__growth = [];
    new MutationObserver(() => window.__growth.push(log.textContent.length))
        .observe(log, {childList: true, subtree: true, characterData: true});
}"""

AUDIT = r"""() => [...document.querySelectorAll("*")].flatMap((element) => {
    const name = element.localName;
    const faults = [];
    if (["iframe", "object", "embed", "base", "form", "svg", "math", "img", "video", "audio"].includes(name)
        && element.closest("[role=log]")) faults.push(`<${name}> in the conversation`);
    if (name === "script" && !element.src) faults.push("a script within the page");
    for (const {name: attribute, value} of element.attributes) {
        if (attribute.startsWith("on")) faults.push(`${name} has ${attribute}`);
        if (["href", "src", "action", "formaction", "xlink:href"].includes(attribute)
            && !/^(https?|mailto):$/.test(new URL(value, document.baseURI).protocol)) {
            faults.push(`${name} leads to ${value}`);
        }
    }
    return faults;
})"""
"""Elements that could run something or ask somebody else, whatever made them; a list of what is wrong with each."""


class Playground:
    """The page at `/`, opened."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.message = page.get_by_role("textbox", name="Message", exact=True)
        self.send = page.get_by_role("button", name="Send", exact=True)
        self.stop = page.get_by_role("button", name="Stop", exact=True)
        self.new_conversation = page.get_by_role("button", name="New conversation", exact=True)
        self.conversations = page.get_by_role("navigation", name="Conversations", exact=True)
        self.log = page.get_by_role("log", name="Conversation", exact=True)
        self.questions = self.log.get_by_role("article", name="You", exact=True)
        self.answers = self.log.get_by_role("article", name="Model", exact=True)
        self.system_prompt = page.get_by_role("textbox", name="System prompt", exact=True)
        self.settings = page.get_by_role("region", name="Settings", exact=True)
        self.api_key = page.get_by_role("textbox", name="API key", exact=True)
        self.server = page.get_by_role("status", name="Server", exact=True)

    @classmethod
    def open(cls, page: Page) -> Playground:
        page.goto("/")
        playground = cls(page)
        expect(playground.send).to_be_visible()
        return playground

    def tab(self, name: str) -> Locator:
        return self.page.get_by_role("tab", name=name, exact=True)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def conversation(self, title: str) -> Locator:
        return self.conversations.get_by_role("button", name=title, exact=True)

    def show_settings(self) -> None:
        """Open the settings where the page is too narrow to show them always, and those that are seldom wanted."""
        self.page.evaluate("for (const box of document.querySelectorAll('details')) box.open = true")
        expect(self.settings).to_be_visible()

    def clipboard(self) -> str:
        self.page.context.grant_permissions(["clipboard-read"])
        text: str = self.page.evaluate("navigator.clipboard.readText()")
        return text

    def setting(self, name: str) -> Locator:
        return self.settings.get_by_label(name, exact=True)

    def ask(self, text: str) -> None:
        """Send a message, and don't wait for the answer."""
        self.message.fill(text)
        self.send.click()

    def chat(self, text: str) -> Locator:
        """Send a message and wait for the end of the answer, which comes back."""
        number = self.answers.count()
        self.ask(text)
        self.settled()
        expect(self.answers).to_have_count(number + 1)
        return self.answers.nth(number)

    def settled(self) -> None:
        """Wait until no answer is being written."""
        expect(self.send).to_be_enabled()
        expect(self.stop).not_to_be_visible()

    def note_growth(self) -> None:
        """Note the length of the conversation whenever the page changes it."""
        self.log.evaluate(NOTE_GROWTH)

    def growth(self) -> list[int]:
        lengths: list[int] = self.page.evaluate("window.__growth")
        return lengths

    def faults(self) -> list[str]:
        """What the page shows that could run, and what has run."""
        faults: list[str] = self.page.evaluate(AUDIT)
        has_run = self.page.evaluate("'__xss' in window")
        return [*faults, *(["a script has run"] if has_run else [])]
