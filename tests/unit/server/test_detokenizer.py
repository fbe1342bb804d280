"""Text comes out in whole characters, and stop strings are found wherever they end."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.detokenizer import REPLACEMENT, Detokenizer, StopChecker, StopCutter, TokenText
from server.text.tokenizer import TextTokenizer

TRICKY = st.sampled_from(
    ["👩‍👩‍👧‍👦", "🏳️‍🌈", "你好，世界", "é", "e\u0301", "𝔘", "한국어", " ", "\n", "<|im_end|>", "\ufffe", "𠀋"]
)
TEXTS = st.lists(TRICKY | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=8).map("".join)


def pushed(tokenizer: TextTokenizer, ids: list[int], prompt_ids: list[int] | None = None) -> list[TokenText]:
    detokenizer = Detokenizer(tokenizer, prompt_ids or [])
    return [detokenizer.push(token_id, is_last=index == len(ids) - 1) for index, token_id in enumerate(ids)]


def test_whole_texts_come_out_in_whole_characters(tokenizer: TextTokenizer, ids_of: Callable[[str], list[int]]) -> None:
    @given(TEXTS, TEXTS)
    def check(prompt: str, text: str) -> None:
        ids = ids_of(text)
        parts = pushed(tokenizer, ids, ids_of(prompt))
        if REPLACEMENT not in text:  # a replacement character cannot be told from half a character
            assert "".join(part.text for part in parts) == text
            assert not any(REPLACEMENT in part.text for part in parts)
        special = [tokenizer.is_special(token_id) for token_id in ids]
        plain = [part for part, is_special in zip(parts, special, strict=True) if not is_special]
        assert all(part.text == part.visible for part in plain)

    check()


def test_any_ids_never_show_half_a_character_as_visible(tokenizer: TextTokenizer) -> None:
    @given(st.lists(st.integers(0, 300), max_size=30))
    def check(ids: list[int]) -> None:
        detokenizer = Detokenizer(tokenizer, [])
        shown = ""
        for index, token_id in enumerate(ids):
            part = detokenizer.push(token_id, is_last=index == len(ids) - 1)
            shown += part.visible
            assert not part.visible.endswith(REPLACEMENT)
        assert len(shown) <= len(tokenizer.decode(ids))

    check()


def test_incomplete_character_waits_for_its_last_byte(
    tokenizer: TextTokenizer, ids_of: Callable[[str], list[int]]
) -> None:
    ids = ids_of("龘")
    assert [part.text for part in pushed(tokenizer, ids)] == ["", "", "龘"]


def test_incomplete_tail_is_dropped_at_the_end(tokenizer: TextTokenizer, ids_of: Callable[[str], list[int]]) -> None:
    ids = ids_of("ok") + ids_of("龘")[:2]
    assert "".join(part.visible for part in pushed(tokenizer, ids)) == "ok"


def test_special_token_hides_itself_but_not_what_was_held(
    tokenizer: TextTokenizer, ids_of: Callable[[str], list[int]]
) -> None:
    half = ids_of("龘")[:1]
    parts = pushed(tokenizer, [*ids_of("a"), *half, *ids_of("<|im_end|>")])
    assert parts[-1] == TokenText(f"{REPLACEMENT}<|im_end|>", "")
    assert parts[0] == TokenText("a", "a")


def check_all(stops: list[str], tokens: list[str]) -> str | None:
    """The text up to and including the stop, or None."""
    checker = StopChecker(stops)
    text = ""
    for token in tokens:
        kept = checker.check(token)
        if kept is not None:
            return text + token[:kept]
        text += token
    return None


@pytest.mark.parametrize(
    ("stops", "tokens", "kept"),
    [
        (["world"], ["Hello ", "world", "!"], "Hello world"),  # at a token's end
        (["Hello"], ["Say", " Hello,", " x"], "Say Hello"),  # inside a token
        (["lo wo"], ["Hel", "lo", " wor", "ld"], "Hello wo"),  # across tokens
        (["."], ["end", ".\n", "more"], "end.\n"),  # one newline stays, as with TGI
        (["."], ["end", ".\n\n", "more"], "end."),
        (["cd", "abc"], ["abcd"], "abc"),  # the first to be completed
        (["aab"], ["a", "a", "a", "b"], "aaab"),
        ([""], ["first", "second"], "first"),
        (["xyz"], ["abc"], None),
        ([], ["abc"], None),
        (["é"], ["caf", "é!"], "café"),
    ],
)
def test_stop_strings(stops: list[str], tokens: list[str], kept: str | None) -> None:
    assert check_all(stops, tokens) == kept


@given(st.lists(st.text("ab\n", max_size=4), max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_stop_strings_agree_with_a_search_of_the_whole_text(tokens: list[str], stops: list[str]) -> None:
    text = "".join(tokens)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    kept = check_all(stops, tokens)
    if not ends:
        assert kept is None
    else:
        assert kept in (text[: min(ends)], text[: min(ends)] + "\n")


def test_only_a_bounded_tail_is_kept() -> None:
    checker = StopChecker(["abc", "defgh"])
    for _ in range(100):
        checker.check("x" * 100)
    assert len(checker._tail) == 4


@given(
    stops=st.lists(st.text("ab", max_size=5), max_size=3),
    parts=st.lists(st.text("abc", max_size=6), max_size=8),
    is_shown=st.booleans(),
)
def test_a_text_is_cut_wherever_its_parts_end(stops: list[str], parts: list[str], is_shown: bool) -> None:
    """Each character is looked at once, and yet the result is that of a search in the whole text."""
    cutter = StopCutter(stops, is_shown=is_shown)
    out, seen = "", ""
    for index, part in enumerate(parts):
        text, is_stopped = cutter.push(part, is_last=index == len(parts) - 1)
        out, seen = out + text, seen + part
        found = [(seen.find(stop), stop) for stop in stops if stop in seen]
        assert is_stopped == bool(found)
        if found:
            start, stop = min(found)
            assert out == seen[: start + len(stop) if is_shown else start]
            return
        held = seen[len(out) :]
        assert seen.startswith(out) and (not held or any(stop.startswith(held) for stop in stops))
    assert out == seen


def test_what_a_long_stop_string_holds_back_costs_nothing_per_token() -> None:
    cutter = StopCutter(["#" * 400_000, "b" + "c" * 400_000])
    started = time.process_time()
    for _ in range(2_000):
        assert cutter.push("#" * 80, is_last=False) == ("", False)
    assert time.process_time() - started < 2, "it was 119 ms for a token with 40,000 characters held back"
