"""Calls read out of a growing text, whatever its pieces."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.chat.bare_calls import call_key
from server.chat.thoughts import ChatReader, Thinking
from server.chat.tool_calls import ForcedCallReader, FreeCallReader
from server.chat.tools import HERMES_HEADER, TGI_HEADER
from server.text.pieces import AnswerReader, Arguments, CallStart, Content, Piece

NAMES = ("f", "get_weather")
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOTHING = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
Calls = list[tuple[str, str]]


def read(reader: AnswerReader, parts: list[str], *, is_cut: bool = False) -> Iterator[Piece]:
    for part in parts:
        yield from reader.push(part)
    yield from reader.finish(is_cut=is_cut)


def summary(pieces: Iterator[Piece]) -> tuple[str, Calls]:
    """The content and the calls that `pieces` add up to; checks their order."""
    content, calls = "", []
    for piece in pieces:
        match piece:
            case Content(text):
                assert text
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case Arguments(index, text):
                assert index == len(calls) - 1
                calls[-1][1] += text
    return content, [(name, arguments) for name, arguments in calls]


def free(text: str, *, is_cut: bool = False, max_calls: int | None = None) -> tuple[str, Calls]:
    return summary(read(free_reader(max_calls), [text], is_cut=is_cut))


def free_reader(max_calls: int | None = None, answered: Collection[str] = ()) -> FreeCallReader:
    return FreeCallReader(NAMES, max_calls, answered=answered)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello", "Hello", []),
        (PARIS, "", [("get_weather", '{"city": "Paris"}')]),
        (f"Let me look.\n{PARIS}", "Let me look.", [("get_weather", '{"city": "Paris"}')]),
        (f"{PARIS}\n{NOTHING}\n", "", [("get_weather", '{"city": "Paris"}'), ("f", "{}")]),
        (f"a {NOTHING} b", "a b", [("f", "{}")]),
        (NOTHING.removesuffix("\n</tool_call>"), "", [("f", "{}")]),  # ended without its closing mark
        ('<tool_call>{"arguments": {"a": {"b": [1.0]}}, "name": "f"}</tool_call>', "", [("f", '{"a": {"b": [1.0]}}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\\"<tool_call>"}}</tool_call>',
            "",
            [("f", '{"a": "</tool_call>\\"<tool_call>"}')],
        ),
        (f'<tool_call>\n{{"name": {NOTHING}', '<tool_call>\n{"name":', [("f", "{}")]),
    ],
)
def test_what_is_a_call(text: str, content: str, calls: Calls) -> None:
    assert free(text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": "b\n"}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": "\\ud800"}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "unbalanced}}</tool_call>',
        "<tool_call>\nf()\n</tool_call> and more",
        '  <tool_call>{"name": "f", "arg',
        '```json\n{"name": "f", "arguments": {}}\n```',
        '<tools>\n{"name": "f", "arguments": {}}\n</tools>',
        "<tool_call> <tool_call> <tool_ca",
        " \n ",
        '<tool_call>{"a":' + "[" * 3000,
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert free(text) == (text, [])


G = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<think>maybe {PARIS}</think>{G}", f"<think>maybe {PARIS}</think>", [("f", '{"a": 1}')]),
        (f"\n<think>\n{PARIS}\n</think>\n\n{G}", f"\n<think>\n{PARIS}\n</think>", [("f", '{"a": 1}')]),
        (f"<think>{PARIS}", f"<think>{PARIS}", []),
        (
            f"So.\n<think>{PARIS}</think> {G} <think>{G}</think>",
            f"So.\n<think>{PARIS}</think> <think>{G}</think>",
            [("f", '{"a": 1}')],
        ),
        (f"{G}</think><think>{G}</thin", f"</think><think>{G}</thin", [("f", '{"a": 1}')]),
        ('<think>{"name": "f", "arguments": {}}</think>', '<think>{"name": "f", "arguments": {}}</think>', []),
        ('<think>?</think>\n{"name": "f", "arguments": {}}', "<think>?</think>", [("f", "{}")]),
        ("<thin", "<thin", []),
    ],
)
def test_a_thought_holds_no_calls(text: str, content: str, calls: Calls) -> None:
    assert free(text) == (content, calls)


def test_a_thought_that_the_prompt_has_begun() -> None:
    reader = FreeCallReader(NAMES, answered=(), thinking=Thinking.IS_CONTENT)
    assert summary(read(reader, list(f"{PARIS}</think>{G}"))) == (f"{PARIS}</think>", [("f", '{"a": 1}')])


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "arguments": {}}', [("f", "{}")]),
        ('\n {"arguments": {"a": "}"}, "name": "f"}\n', [("f", '{"a": "}"}')]),
        (
            '{"name": "f", "arguments": {}}\n{ "name" : "get_weather", "arguments": {"a": [1]}}',
            [("f", "{}"), ("get_weather", '{"a": [1]}')],
        ),
    ],
)
def test_an_answer_of_nothing_but_calls_needs_no_marks(text: str, calls: Calls) -> None:
    assert free(text) == ("", calls)
    assert free(text, max_calls=1) == ("", calls[:1])
    assert summary(read(FreeCallReader(NAMES), [text])) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "unknown", "arguments": {}}',
        '{"name": "f"}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": {}, "more": 1}',
        '{"name": "f", "arguments": {}} and words',
        'Words: {"name": "f", "arguments": {}}',
        '{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}',
        '[{"name": "f", "arguments": {}}]',
        '{"name": "f", "arguments": {"a": }}',
        '{"name": "f", "arguments": {',
        '{"name": ["f"], "arguments": {}}',
        '{"city": "Paris"}',
        "{}",
        "{",
    ],
)
def test_an_answer_with_anything_else_is_content(text: str) -> None:
    assert free(text) == (text, [])


def test_bare_calls_that_are_cut_off_are_told_as_far_as_they_go() -> None:
    whole = '{"name": "f", "arguments": {}}'
    cut = '{"name": "get_weather", "arguments": {"city": "Par'
    assert free(cut, is_cut=True) == ("", [("get_weather", '{"city": "Par')])
    assert free(f"{whole}\n{cut}", is_cut=True) == ("", [("f", "{}"), ("get_weather", '{"city": "Par')])
    assert free(f"{whole}\n{cut}", is_cut=True, max_calls=1) == ("", [("f", "{}")])
    assert free(f'{whole}\n{{"na', is_cut=True) == ("", [("f", "{}")])
    assert free('{"name": "f", "argu', is_cut=True) == ('{"name": "f", "argu', [])


def test_a_bare_call_that_stands_there_already_ends_the_answer() -> None:
    f, g = '{"name": "f", "arguments": {"a": 1}}', '{"name": "get_weather", "arguments": {}}'
    for cut in range(3):
        reader = free_reader()
        assert reader.push(f"{f}\n{g}\n") == [] and not reader.is_over
        assert reader.push(f"{f}{f[:cut]}") == [] and reader.is_over
        assert summary(iter(reader.finish(is_cut=False))) == ("", [("f", '{"a": 1}'), ("get_weather", "{}")])


def test_calls_have_a_key_however_deep_their_arguments_are() -> None:
    """JSON can be read a little deeper than it can be written."""
    for depth in range(800, 1000):
        assert "[[[[" in call_key("f", "[" * depth + "]" * depth)


def test_a_bare_call_that_was_answered_is_content() -> None:
    """Small models write it again and again, and the client's loop would not end."""
    text = '{"name": "f", "arguments": {"a": 1, "b": 2}}'
    for arguments in ({"b": 2, "a": 1}, '{"b":2, "a":1}'):
        assert summary(read(free_reader(None, {call_key("f", arguments)}), [text])) == (text, [])
    for key in (call_key("f", {"a": 1}), call_key("get_weather", {"a": 1, "b": 2}), call_key("f", "{")):
        assert summary(read(free_reader(None, {key}), [text])) == ("", [("f", '{"a": 1, "b": 2}')])
    marked = f"<tool_call>{text}</tool_call>"
    assert summary(read(free_reader(None, {call_key("f", {"a": 1, "b": 2})}), [marked]))[1]


@pytest.mark.parametrize(
    ("parts", "num_held"),
    [
        (["{", '"na', 'me": "g', "a", "rage"], 3),
        (["{", '"', "city", '": 1}'], 2),
        (["{", "\n", "}"], 2),
        (["[", '{"name": "f"'], 0),
        (["{", '"name": 3'], 1),
    ],
)
def test_json_that_cannot_become_a_call_is_not_held_back(parts: list[str], num_held: int) -> None:
    reader = free_reader()
    told = [reader.push(part) for part in parts]
    assert [bool(pieces) for pieces in told[: num_held + 1]] == [False] * num_held + [True]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
        ('Hm.\n<tool_call>\n{"name": "f", "arguments": {', "Hm.", [("f", "{")]),
        (NOTHING.removesuffix("_call>"), "", [("f", "{}")]),
        ('<tool_call>\n{"name": "f", "argu', '<tool_call>\n{"name": "f", "argu', []),
        ('<tool_call>\n{"name": "unknown", "arguments": {"', '<tool_call>\n{"name": "unknown", "arguments": {"', []),
    ],
)
def test_a_call_that_is_cut_off_is_told_as_far_as_it_goes(text: str, content: str, calls: Calls) -> None:
    assert free(text, is_cut=True) == (content, calls)


def test_no_more_calls_than_asked_for() -> None:
    assert free(f"a\n{PARIS}\n{NOTHING} b", max_calls=1) == ("a", [("get_weather", '{"city": "Paris"}')])


def test_content_is_not_held_back_for_long() -> None:
    reader = free_reader()
    assert [reader.push(part) for part in ("1 <", "2", " 3 <tool", "_x", " <tool_call>", "no")] == [
        [Content("1")],
        [Content(" <2")],
        [Content(" 3")],
        [Content(" <tool_x")],
        [],
        [Content(" <tool_call>"), Content("no")],
    ]


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<tool",
    "_call>",
    "\n",
    " ",
    "{",
    "}",
    '"',
    "\\",
    "text",
    PARIS,
    NOTHING,
    "<think>",
    "</think>",
    '{"name": "f", "arguments": {"a": 1}}',
    '{"name": "f", "arguments": ',
    '{"a": [1, {"b": "<tool_call>"}]}',
    '{"name": "unknown", "arguments": {}}',
    "é",
]


READERS: list[Callable[..., ChatReader]] = [
    ChatReader,
    partial(ForcedCallReader, HERMES_HEADER),
    partial(FreeCallReader, NAMES),
    partial(FreeCallReader, NAMES, answered=()),
    partial(FreeCallReader, NAMES, 1, answered=()),
    partial(FreeCallReader, NAMES, answered={call_key("f", {"a": 1})}),
]


def joined(pieces: Iterator[Piece]) -> list[tuple[Any, ...]]:
    """The pieces without their cuts: those of one kind that follow each other are one."""
    groups = itertools.groupby(map(_with_kind, pieces), key=lambda piece: piece[:-1])
    return [(*kind, "".join(piece[-1] for piece in group)) for kind, group in groups]


def _with_kind(piece: Piece) -> tuple[Any, ...]:
    return (type(piece), *dataclasses.astuple(piece))


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.lists(st.integers(0, 300), max_size=20),
    st.booleans(),
    st.sampled_from(READERS),
    st.sampled_from(Thinking),
)
def test_the_cuts_make_no_difference(
    text: str, cuts: list[int], is_cut: bool, reader_of: Callable[..., ChatReader], thinking: Thinking
) -> None:
    places = sorted(min(cut, len(text)) for cut in cuts)
    parts = [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]
    readers = [reader_of(thinking=thinking) for _ in range(3)]
    whole, *others = (
        joined(read(reader, pieces, is_cut=is_cut))
        for reader, pieces in zip(readers, ([text], parts, list(text)), strict=True)
    )
    assert others == [whole] * 2
    assert len({(reader.num_calls, reader.is_over) for reader in readers}) == 1


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.booleans(), st.sampled_from([None, 1]))
def test_nothing_of_a_free_answer_is_lost(text: str, is_cut: bool, max_calls: int | None) -> None:
    content, calls = free(text, is_cut=is_cut, max_calls=max_calls)
    if not calls:
        assert content == text
    if not is_cut:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


HERMES = [
    ('<tool_call>\n{"name": "f", "arguments": {"a": {"}": "\\"}"}, "b": [{}]}}\n</tool_call>', "f"),
    ('<tool_call>\n{"name": "g\\"", "arguments": {}}\n</tool_call>', 'g"'),
]


@given(st.lists(st.sampled_from(HERMES), min_size=1, max_size=3), st.lists(st.integers(0, 200)))
def test_forced_calls(written: list[tuple[str, str]], cuts: list[int]) -> None:
    text = "\n".join(call for call, _ in written)
    places = sorted(min(cut, len(text)) for cut in cuts)
    parts = [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]
    content, calls = summary(read(ForcedCallReader(HERMES_HEADER), parts))
    assert content == ""
    told = written[: next((i for i, call in enumerate(written) if call in written[:i]), None)]
    expected = [(name, json.loads(call[len("<tool_call>") : -len("</tool_call>")])) for call, name in told]
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [(n, c["arguments"]) for n, c in expected]


def test_forced_arguments_come_as_they_are_written() -> None:
    parts = ["<tool_call>", '\n{"name": "f", "argum', 'ents": {"a', '": 1', "}", "}\n", "</tool_call>"]
    reader = ForcedCallReader(HERMES_HEADER)
    assert [reader.push(part) for part in parts] == [
        [],
        [],
        [CallStart(0, "f"), Arguments(0, '{"a')],
        [Arguments(0, '": 1')],
        [Arguments(0, "}")],
        [],
        [],
    ]
    assert reader.finish(is_cut=False) == []


def test_a_call_that_was_written_before_ends_the_answer() -> None:
    """It is held back as long as it may become that."""

    def call(arguments: str) -> str:
        return f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>\n'

    reader = ForcedCallReader(HERMES_HEADER)
    assert reader.push(call('{"a": 1}'))[0] == CallStart(0, "f")
    start = call('{"a": 1}').partition("1")[0]
    assert reader.push(start) == []
    assert reader.push("12}}\n</tool_call>\n") == [CallStart(1, "f"), Arguments(1, '{"a": 12}')]
    assert not reader.is_over
    assert reader.push(call('{"a": 12}') + call('{"a": 3}')) == [] and reader.is_over
    assert reader.num_calls == 2 and reader.finish(is_cut=False) == []


def test_another_function_with_the_same_arguments_is_another_call() -> None:
    text = "\n".join(NOTHING.replace('"f"', f'"{name}"') for name in ("f", "g", "f"))
    reader = ForcedCallReader(HERMES_HEADER)
    assert summary(read(reader, [text])) == ("", [("f", "{}"), ("g", "{}")])
    assert reader.is_over


def test_forced_call_that_is_cut_off() -> None:
    start = '<tool_call>\n{"name": "f", "arguments": '
    assert summary(read(ForcedCallReader(HERMES_HEADER), [start + '{"a'], is_cut=True)) == ("", [("f", '{"a')])
    assert summary(read(ForcedCallReader(HERMES_HEADER), [start[:-8]], is_cut=True)) == ("", [])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"function": {"_name": "f", "city": "Paris", "o": {"a": {}}}}', '{"city": "Paris", "o": {"a": {}}}'),
        ('{"function": {"_name": "f"}}', "{}"),
    ],
)
def test_calls_in_the_format_of_tgi(text: str, arguments: str) -> None:
    assert summary(read(ForcedCallReader(TGI_HEADER, "{"), list(text))) == ("", [("f", arguments)])
