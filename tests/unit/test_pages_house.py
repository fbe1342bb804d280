"""The sources of the pages: no way from a text to HTML or to a program, no other origin, nothing lost, nothing long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.ui.pages import MEDIA_TYPES, SOURCE
from tests.unit.house import MAX_FILE_LINES

MAX_BYTES = 200_000
MAX_COLUMNS = 120
NAMED = re.compile(r"(?:href=\"ui/|src=\"ui/|from \"\./)([\w.]+)\"")

FORBIDDEN = {
    r"\b(?:inner|outer)HTML\b|\binsertAdjacentHTML\b|\bsetHTML(?:Unsafe)?\b|\bsrcdoc\b": "makes elements of a text",
    r"\bDOMParser\b|\bparseFromString\b|\bparseHTMLUnsafe\b|\bcreateContextualFragment\b": "makes elements of a text",
    r"\bdocument\s*\.\s*write": "makes elements of a text",
    r"\beval\s*\(|\bFunction\s*\(|\bset(?:Timeout|Interval)\(\s*[\"'`]|\bimport\s*\(": "makes a program of a text",
    r"(?i:\bjavascript:)": "makes a program of a text",
    r"(?i:<script(?![^>]*\ssrc=)|<style\b|\sstyle=|<[^>]*\son\w+\s*=)": "stands in the page, which the policy forbids",
    r"\bsetAttribute\((?:\w+,\s*)?[\"'`]on": "makes a program of a text",
    r"(?:https?:|wss?:|[\"'(=]\s*)//\w": "leads to another origin",
    r"@import\b|\burl\((?!\s*[\"']?#)": "asks for more than the page names",
    r"\bdocument\s*\.\s*cookie\b|\bsendBeacon\b|\bWebSocket\b|\bWorker\b|\bpostMessage\b": "has no use here",
}
"""A pattern -> what is wrong with it."""
NAMESPACE = "http://www.w3.org/2000/svg"
"""A name, which nobody asks for anything."""


def complaints_of(text: str) -> list[str]:
    text = text.replace(NAMESPACE, "")
    return [
        f"{match.group(0)!r} {reason}" for pattern, reason in FORBIDDEN.items() for match in re.finditer(pattern, text)
    ]


def source_files() -> list[Path]:
    return [path for path in SOURCE.rglob("*") if path.is_file()]


def test_no_source_of_the_pages_is_able_to_run_a_text_or_to_ask_another_origin() -> None:
    complaints = [
        f"{path.name}: {complaint}" for path in source_files() for complaint in complaints_of(path.read_text())
    ]
    assert not complaints, "\n".join(complaints)


def test_the_pages_are_light_and_of_kinds_that_are_served() -> None:
    assert {path.suffix for path in source_files()} == MEDIA_TYPES.keys()
    assert sum(path.stat().st_size for path in source_files()) < MAX_BYTES


def test_no_source_is_long_or_wide() -> None:
    texts = {path.name: path.read_text() for path in source_files() if path.suffix != ".svg"}
    assert [name for name, text in texts.items() if text.count("\n") > MAX_FILE_LINES] == []
    assert [name for name, text in texts.items() if max(map(len, text.splitlines())) > MAX_COLUMNS] == []


def test_every_file_that_a_file_names_is_there_and_every_file_is_named() -> None:
    named = {name for path in source_files() for name in NAMED.findall(path.read_text())}
    assert named == {path.name for path in source_files() if path.suffix != ".html"}


@pytest.mark.parametrize(
    "text",
    [
        "node.innerHTML = text",
        'node["outerHTML"] = text',
        "node.insertAdjacentHTML('beforeend', text)",
        "document . write(text)",
        "new DOMParser().parseFromString(text, 'text/html')",
        "range.createContextualFragment(text)",
        "frame.srcdoc = text",
        "eval(text)",
        "new Function(text)()",
        'link.setAttribute("onclick", text)',
        'setTimeout("act()", 1)',
        "import(text)",
        'link.href = "javascript:void 0"',
        "<script>act()</script>",
        '<p style="color: red">',
        '<button class="x" onclick="act()">',
        "fetch('https://elsewhere.invalid/x')",
        '<script src="//elsewhere.invalid/x.js"></script>',
        "<img src=//elsewhere.invalid/x.png>",
        "p { background: url(x.png) }",
        "@import 'x.css';",
        "navigator.sendBeacon('x')",
    ],
)
def test_a_planted_fault_is_found(text: str) -> None:
    assert complaints_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "node.textContent = text; // https is a word",
        "document.createElementNS('http://www.w3.org/2000/svg', 'path')",
        "setTimeout(() => act(), 1); const functions = []; run(function () {});",
        'import { element } from "./dom.js";',
        '<script type="module" src="ui/playground.js"></script><link rel="stylesheet" href="ui/pages.css">',
        "/^(https?|mailto):$/.test(url.protocol)",
        "svg { fill: url(#gradient) }",
    ],
)
def test_what_a_page_may_have_is_no_fault(text: str) -> None:
    assert complaints_of(text) == []
