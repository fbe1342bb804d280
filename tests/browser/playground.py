"""The playground as a person knows it: everything is found by its role and its name."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

from tests.browser.browser import TIMEOUT_MS

NOTE_GROWTH = """(log) => {
    window.__growth = [];
    new MutationObserver(() => window.__growth.push(log.textContent.length))
        .observe(log, {childList: true, subtree: true, characterData: true});
}"""

SEE = """(answer, [text, timeout]) => new Promise((resolve, reject) => {
    const look = () => answer.textContent.includes(text) && resolve();
    new MutationObserver(look).observe(answer, {childList: true, subtree: true, characterData: true});
    setTimeout(() => reject(new Error(`${text} is not in ${answer.textContent}`)), timeout);
    look();
})"""

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
        self.tools = page.get_by_role("textbox", name="Functions", exact=True)
        self.answer_format = page.get_by_role("combobox", name="response_format", exact=True)
        self.api_key = page.get_by_role("textbox", name="API key", exact=True)
        self.alert = self.log.get_by_role("alert")
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
        """Bring the settings out where there is little room, those that are seldom wanted as well."""
        if not self.settings.is_visible():
            self.button("Settings").click()
        self.settings.evaluate("(region) => region.querySelectorAll('details').forEach((box) => { box.open = true; })")

    def clipboard(self) -> str:
        self.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        text: str = self.page.evaluate("navigator.clipboard.readText()")
        return text

    def setting(self, name: str) -> Locator:
        return self.settings.get_by_label(name, exact=True)

    def ask(self, text: str) -> None:
        """Send a message, and don't wait for the answer."""
        self.message.fill(text)
        self.send.click()

    def complete(self, prompt: str) -> Locator:
        """Let the model go on with a text and wait for the end of the answer, which comes back."""
        self.page.get_by_role("textbox", name="Prompt", exact=True).fill(prompt)
        return self.written("Complete", "Completion")

    def fill_in(self, before: str, after: str) -> Locator:
        """Let the model write what is between two texts, which comes back."""
        self.page.get_by_role("textbox", name="Before", exact=True).fill(before)
        self.page.get_by_role("textbox", name="After", exact=True).fill(after)
        return self.written("Fill in", "Middle")

    def written(self, button: str, result: str) -> Locator:
        """Press a button and wait until the tokens that it makes have come."""
        self.button(button).click()
        expect(self.stop).not_to_be_visible()
        return self.page.get_by_role("listbox", name=result, exact=True)

    def put_in_example(self, place: str) -> None:
        """Fill the field of tools or of the schema with the page's own example."""
        examples = {"tools": "#examples-of-tools", "schema": "#examples-of-schemas"}
        self.page.locator(examples[place]).get_by_role("button").click()

    def copy_as(self, language: str) -> str:
        """The program that the page copies."""
        self.button(f"Copy as {language}").click()
        return self.clipboard()

    def chat(self, text: str) -> Locator:
        """Send a message and wait for the end of the answer, which comes back."""
        number = self.answers.count()
        self.ask(text)
        self.settled()
        expect(self.answers).to_have_count(number + 1)
        return self.answers.nth(number)

    def see(self, text: str) -> None:
        """Wait until the last answer has `text`, looking at every change."""
        self.answers.last.evaluate(SEE, [text, TIMEOUT_MS])

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
