"""What a link or an answer may do to the playground, in short; tests/slow/browser has more of it."""

from __future__ import annotations

import subprocess

import pytest
from playwright.sync_api import expect

from tests.browser.pages_server import PagesServer
from tests.browser.playground import Playground

TELL_ARGUMENTS = 'curl() { printf "%s\\n" "$@"; }\n'
"""A shell's function in the place of curl."""


@pytest.mark.parametrize("path", ["/ui", "/?;echo${IFS}owned;`echo${IFS}owned`'$(echo${IFS}owned)#x"])
def test_a_copied_command_asks_this_server_whatever_led_to_the_page(
    playground: Playground, server: PagesServer, path: str
) -> None:
    playground.page.goto(path)
    playground.message.fill("It's $HOME")
    program = playground.copy_as("curl")
    done = subprocess.run(["sh", "-c", TELL_ARGUMENTS + program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["-N", f"{server.url}/v1/chat/completions"]
    assert "It's $HOME" in done.stdout and "owned" not in done.stdout


CURL_BEHIND_A_PROXY = """async () => {
    const { LANGUAGES } = await import("./ui/snippets.js");
    const [, curl] = LANGUAGES[0];
    return curl({ path: "v1/completions", body: {} }, "http://host.invalid/a;echo owned/", false);
}"""


def test_the_address_in_a_copied_command_is_one_word_whatever_a_proxy_has_put_before(playground: Playground) -> None:
    program = playground.page.evaluate(CURL_BEHIND_A_PROXY)
    done = subprocess.run(["sh", "-c", TELL_ARGUMENTS + program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["-N", "http://host.invalid/a;echo owned/v1/completions"]


def test_an_answer_may_have_any_end_of_line(playground: Playground, server: PagesServer) -> None:
    server.engine.answers = ["one\u2028two\u2029three\x85four\rfive"]
    expect(playground.chat("Which lines?")).to_contain_text("five")
    expect(playground.alert).to_have_count(0)
